"""Measurements of this machine, and of a model on it.

Enters: a model's name or config, an `Engine`.
Leaves: sizes, memory, times; models of random weights to measure with; whether this machine computes correctly.
May import: errors, version, config, backend, quantize, inputs, network, storage, hub, decoding.
"""
