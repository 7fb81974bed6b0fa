"""Foreign checkpoints in, our folder out: read -> map -> fold -> cast -> save; and back to transformers' layout.

Everything that is not in our own format enters through here; the runtime knows one layout and loads it strictly.
"""

from .config_map import check_fit
from .export import to_transformers
from .key_map import check_layout
from .pipeline import convert, open_foreign

__all__ = ["check_fit", "check_layout", "convert", "open_foreign", "to_transformers"]
