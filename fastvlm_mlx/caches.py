"""Where downloads are kept, how large they are, and how to be rid of them.

Ours is the environment's FASTVLM_CACHE, else fastvlm-mlx in XDG_CACHE_HOME or ~/.cache:

    models/NAME         Apple's archives, unpacked     archives/NAME.zip.part    one that was interrupted
    notices/apple-amlr  that the licence was pointed at
"""

import os
from pathlib import Path

from .errors import HubError


def root() -> Path:
    """The folder of our cache, which need not exist; raises HubError where there is no home for it."""
    chosen = os.environ.get("FASTVLM_CACHE")
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.path.expanduser(chosen or f"{parent}/fastvlm-mlx"))  # noqa: PTH111  (leaves what it cannot expand)
    if not folder.is_absolute() and not chosen:
        raise HubError(f"There is no home folder to keep downloads in ({folder}); set FASTVLM_CACHE to a folder.")
    return folder
