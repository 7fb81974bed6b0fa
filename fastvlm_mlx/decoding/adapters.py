"""The name of an adapter -> the adapter: a folder of ours, or one of PEFT's or mlx-lm's."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ModelConfig
from ..errors import OptionError, shown
from ..files import paths

if TYPE_CHECKING:
    from ..storage.adapter import Adapter


def find_adapter(adapter: "str | os.PathLike[str] | Adapter | None", config: ModelConfig) -> "Adapter | None":
    """The adapter itself, or the one in a folder; None for None.

    Raises OptionError where the folder holds none, CheckpointError where it is damaged.
    """
    if adapter is None:
        return None
    from ..storage.adapter import Adapter, is_adapter, read_adapter

    if isinstance(adapter, Adapter):
        return adapter
    if not isinstance(adapter, (str, os.PathLike)):
        raise OptionError(f"`adapter` is {shown(adapter)}, expected the path of an adapter's folder.")
    folder = Path(paths.find(adapter))
    if not os.path.isdir(folder):  # noqa: PTH112  (false, too, for impossible names)
        raise OptionError(f"{shown(os.fspath(adapter))}: no such folder with an adapter in it; check `adapter`.")
    if is_adapter(folder):
        return read_adapter(folder)
    from ..convert.adapters import open_foreign_adapter

    found: Adapter = open_foreign_adapter(folder, config)
    return found
