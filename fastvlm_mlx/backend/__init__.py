"""How the network is computed here: the operations whose best form depends on the device.

Enters: arrays of MLX, and the default device.
Leaves: arrays; on a CPU from the forms in `cpu`, elsewhere from MLX's general ones.
May import: errors.
"""
