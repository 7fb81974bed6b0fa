"""Quantising by measurement: what rounding each layer does to a model's own answers, and what was lost in all.

Enters: an open model, pictures with questions, a recipe.
Leaves: a plan of bits per layer, a quantised folder, a report of its quality.
May import: errors, config, files, backend, quantize, inputs, network, storage, hub, convert, decoding, diagnostics.
"""
