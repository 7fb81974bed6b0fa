"""Foreign checkpoints in, our folder out: read -> map -> fold -> cast -> save; and back to transformers' layout.

Everything that is not in our own format enters through here; the runtime knows one layout and loads it strictly.
"""

from .export import to_transformers
from .pipeline import convert, open_foreign

__all__ = ["convert", "open_foreign", "to_transformers"]
