"""Our folder: opened strictly, its weights filled into a network, saved atomically.

Enters: a folder with config.json, safetensors and tokenizer.json.
Leaves: an `OpenModel`; a network with its weights in place; a new folder.
May import: errors, config, files, backend, quantize, inputs, network.
"""
