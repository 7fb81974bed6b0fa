"""The forms that quantised layers take, and which layers a recipe quantises.

Enters: a network's layers, a recipe.
Leaves: layers that compute with packed integers; packed integers and their scales.
May import: errors, config, backend.
"""
