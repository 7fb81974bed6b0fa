"""The names that a model can have: 'tiny', a folder, a repository of the Hub, one of Apple's archives."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

BUILT_IN = "tiny"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ARCHIVE = re.compile(r"(llava-fastvithd_(?:0\.5b|1\.5b|7b)_stage[23])(?:\.zip)?")  # of apple/ml-fastvlm

HUB_ADDRESS = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:huggingface\.co|hf\.co)/|hf://)", re.IGNORECASE
)
# What else the Hub has at such addresses.
OTHERS = ("datasets", "spaces", "docs", "collections", "papers", "blog", "models")
REVISION = re.compile(r"[A-Za-z0-9][\w./+-]{0,199}")
VIEWS = ("tree", "blob", "resolve", "raw", "commit")  # what stands before the revision in an address

Origin = Literal["built-in", "folder", "hub", "archive"]


class HubModel(NamedTuple):
    """A repository of the Hub (OWNER/NAME) and the branch, tag or commit that was named with it, if any."""

    name: str
    revision: str | None = None


def hub_model(text: str) -> HubModel | None:
    """Parse a Hub name (OWNER/NAME, OWNER/NAME@REVISION) or an address of the Hub; None for anything else."""
    text = text.strip()
    address = HUB_ADDRESS.match(text)
    if address is None:
        name, _, revision = text.partition("@")
        return _hub_model(name.rstrip("/"), revision if "@" in text else None)
    from urllib.parse import unquote

    parts = re.split(r"[?#]", text[address.end() :], maxsplit=1)[0].strip("/").split("/")
    if len(parts) < 2 or parts[0].lower() in OTHERS:
        return None
    (owner, last), view = parts[:2], [unquote(part) for part in parts[2:]]
    last, _, revision = last.partition("@")
    if not view or view == ["tree"]:
        return _hub_model(f"{owner}/{last}", revision or None)
    if view[0] not in VIEWS or len(view) < 2 or revision:
        return None
    length = 3 if view[1:3] == ["refs", "pr"] else 1
    if view[0] in ("tree", "commit") and len(view) > 1 + length:  # a folder of the repository
        return None
    return _hub_model(f"{owner}/{last}", "/".join(view[1 : 1 + length]))


def is_revision(text: str) -> bool:
    """Whether a text can be the name of a branch, a tag or a commit."""
    return REVISION.fullmatch(text) is not None and ".." not in text


def _hub_model(name: str, revision: str | None) -> HubModel | None:
    name = name.removesuffix(".git")  # as in the address for cloning
    right = revision is None or is_revision(revision)
    return HubModel(name, revision) if right and HUB_NAME.fullmatch(name) else None


@dataclass(frozen=True)
class Found:
    """A model on this machine: its folder, the name it was asked for by, and what kind of name that was."""

    folder: Path
    name: str
    origin: Origin

    @property
    def built_in(self) -> bool:
        """Whether it is the model inside this package, which has pictures to calibrate on."""
        return self.origin == "built-in"

    @property
    def title(self) -> str:
        """The model's name in a folder made from it: 'tiny', the Hub's name, or its folder's name."""
        return self.name if self.origin in ("built-in", "hub") else self.folder.resolve().name
