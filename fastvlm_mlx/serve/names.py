"""What the model that is served is called: one name and its aliases, never where it lies."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import listed, shown
from .refusal import Refusal, bad_request

OWNER = "fastvlm-mlx"  # of a model whose name says no other


@dataclass(frozen=True)
class ModelNames:
    """The names a request may give the model; the first is the one that answers carry."""

    names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, asked: str) -> ModelNames:
        """The names of a model that was asked for by a name, or by the path of a folder."""
        path = os.path.expanduser(asked)  # noqa: PTH111  (a name need not be a possible path)
        if os.path.isdir(path):  # noqa: PTH112
            return cls((Path(path).resolve().name or OWNER,))
        last = asked.rstrip("/").rpartition("/")[2].partition("@")[0]
        return cls(tuple(dict.fromkeys((asked, last))))

    @property
    def served(self) -> str:
        """The name that answers carry."""
        return self.names[0]

    def check(self, asked: object) -> None:
        """Raise a Refusal unless a request's `model` is one of the names, or was left out."""
        if asked is None or asked in self.names:
            return
        if not isinstance(asked, str):
            raise bad_request(f"`model` is {shown(asked)}, expected a name, such as {shown(self.served)}.", "model")
        raise Refusal(
            404,
            f"`model` is {shown(asked)}, and this server has {listed(self.names)}; name that, or leave `model` out.",
            param="model",
            code="model_not_found",
        )

    def to_list(self) -> list[dict[str, Any]]:
        """An object of OpenAI's list of models for each name."""
        return [self.to_dict(name) for name in self.names]

    def to_dict(self, name: str) -> dict[str, Any]:
        """OpenAI's object of one model; raises a Refusal for a name that is none of these."""
        self.check(name)
        owner = name.partition("/")[0] if "/" in name else OWNER
        return {"id": name, "object": "model", "created": self.created, "owned_by": owner}
