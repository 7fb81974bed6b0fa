"""This machine, and what a model is, takes and does on it.

Enters: a model's name or config, an `Engine`.
Leaves: sizes, memory, times; models of random weights to measure with; whether this machine computes what it should.
May import: errors, version, config, backend, quantize, inputs, network, storage, hub, decoding.
"""
