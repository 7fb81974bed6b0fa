"""Our model folder: opened and checked, its weights put into a network, and written atomically.

Enters: a folder of ours, or the path where one is to be written.
Leaves: an `OpenModel`, a filled network, a written folder; CheckpointError, OutputError.
May import: errors, config, files, backend, quantize, network, inputs.
"""
