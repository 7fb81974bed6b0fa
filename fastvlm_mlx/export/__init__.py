"""Out of Python: the image encoder for Core ML, a whole model as ONNX graphs; each with a report of what is known of
it.

Enters: an `OpenModel`, and pictures to measure with.
Leaves: packages and folders that other programs load.
May import: errors, version, progress, config, files, quantize, inputs, network, storage, hub, convert, decoding.
"""
