"""Out of Python: a model's image encoder for Core ML, with a report beside it of what is known about what was written.

Enters: an `OpenModel`, and pictures to measure with.
Leaves: packages that other programs load.
May import: errors, version, progress, config, files, quantize, inputs, network, storage, hub, convert, decoding.
"""
