"""Fewer bits per weight: what each bit costs, and where bits are best spent.

    recipes.py      which layers, at how many bits, which are left alone and why
    rounding.py     a weight matrix -> packed integers and 16-bit scales
    layers.py       the layers that compute with them
    folder.py       a model folder -> a quantised one
    examples.py     pictures, questions and answers
    chain.py        the network as a chain of steps, so that one step can be looked at alone
    awq.py          scales moved into neighbouring weights before rounding
    sensitivity.py  what rounding one layer does to the answers, and how a budget of bytes is spent
    estimates.py    what every recipe takes, from the shapes alone
    quality.py      a model against the one it replaces
    report.py       the result as a table, JSON, a picture, and a section of the model card

Only the first three are imported on the way to an answer.
"""

from .layers import QuantizedEmbedding, QuantizedLinear, apply, packed_layers
from .recipes import BITS, DEFAULT_GROUP, MODES, RECIPES, Plan, Recipe, check_bits, choose, plan
from .rounding import quantized, scale_type

__all__ = [
    "BITS", "DEFAULT_GROUP", "MODES", "RECIPES", "Plan", "QuantizedEmbedding", "QuantizedLinear", "Recipe", "apply", "check_bits",
    "choose", "packed_layers", "plan", "quantized", "scale_type",
]  # fmt: skip
