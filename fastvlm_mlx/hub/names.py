"""What a model can be called ('tiny', a repository of the Hub, one of Apple's archives, or a folder), and where it lies."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BUILT_IN = "tiny"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ARCHIVE = re.compile(r"(llava-fastvithd_(?:0\.5b|1\.5b|7b)_stage[23])(?:\.zip)?")  # of apple/ml-fastvlm

Origin = Literal["built-in", "folder", "hub", "archive"]


@dataclass(frozen=True)
class Found:
    """A model on this machine: its folder, the name it was asked for by, and which kind of name that was."""

    folder: Path
    name: str
    origin: Origin

    @property
    def built_in(self) -> bool:
        """Whether it is the model inside this package, whose calibration pictures lie beside it."""
        return self.origin == "built-in"

    @property
    def title(self) -> str:
        """What a folder made from it says it was made from: 'tiny', the Hub's name, or the name of its folder."""
        return self.name if self.origin in ("built-in", "hub") else self.folder.resolve().name
