"""From a request to its answer: prefill, then token by token, alone or in a batch.

Enters: a model's name, pictures, questions, options.
Leaves: answers, whole or in chunks; where they looked.
May import: errors, config, progress, files, backend, quantize, inputs, network, storage, hub, convert.
"""
