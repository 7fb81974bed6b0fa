"""Fine-tuning: a model learns rows of pictures, questions and answers, and what it learned is an adapter.

Enters: an engine with its weights loaded, rows in any of the forms people have, options.
Leaves: an adapter's folder with the log of the run and its state, to be gone on from.
May import: errors, config, files, backend, quantize, inputs, network, storage, hub, convert, decoding.
"""
