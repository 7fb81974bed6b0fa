"""Checkpoints of other layouts in, our folder out (read, map, fold, cast, save); and back to transformers' layout.

Enters: a checkpoint's folder of any other layout. Everywhere else only our own format is known.
Leaves: an `OpenModel`, a folder of ours, a folder of transformers'.
May import: errors, config, files, quantize, inputs, network, storage, hub.
"""

from .config_map import check_fit
from .export import to_transformers
from .key_map import check_layout
from .pipeline import convert, open_foreign

__all__ = ["check_fit", "check_layout", "convert", "open_foreign", "to_transformers"]
