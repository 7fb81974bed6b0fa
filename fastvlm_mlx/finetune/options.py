"""What is trained, how fast and for how long: every option of `tune`, checked before anything is read."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ..config import check_resolution, is_number, is_whole
from ..errors import OptionError, listed, shown
from ..inputs.prompt import PROMPT
from ..storage.adapter import MAX_RANK
from .formats import Data

TRAINED = ("projector", "lora", "full", "tower", "embeddings")
MAX_STEPS = 100_000_000
NONE = "none"  # in the place of a path

# The paper's stages: what each trains, and the rate that LLaVA's scripts have for it.
STAGES: dict[str, dict[str, Any]] = {
    "align": {"train": ("projector",), "projector_lr": 1e-3},
    "adapt": {"train": ("lora", "projector"), "lr": 2e-4, "projector_lr": 2e-5},
    "full": {"train": ("projector", "full", "tower"), "lr": 2e-5, "projector_lr": 2e-5, "tower_lr": 2e-6},
}


@dataclass(frozen=True)
class TuneOptions:
    """How a model is fine-tuned. Raises OptionError for a value out of its range.

    `train` names parts: "projector", "lora" (low-rank updates of the decoder), "full" (the whole decoder), "tower" (the
    image encoder); `stage` is a preset of parts and rates: "align", "adapt" (the default) or "full". `rank`, `alpha`,
    `rslora` and `dora` say what the updates are, `layers` how many of the last decoder layers get one (all by default).

    `lr`, `projector_lr` and `tower_lr` are the highest learning rates, reached after the share `warmup` of all steps
    and falling to zero as a cosine; `weight_decay` is AdamW's, of matrices alone; `clip` bounds the norm of a step's
    gradient. Training takes `epochs` over the rows, or `steps`, or about `minutes`. A step learns from `batch` times
    `accumulate` sequences; with `share`, a sequence is a picture with all its questions, else a row. `checkpoint`
    computes layers twice and takes less memory.

    `resolution` are the sides in pixels that pictures are trained at. `replay` are old rows that every step sees
    `replay_share` of, so that they are not forgotten: data as for the new ones, "none", or by default the built-in
    model's own questions for "tiny". `eval` are new rows held out (by default a tenth of the pictures), looked at every
    `eval_every` steps; training stops early after `patience` looks that found nothing better. `cache` is the folder of
    the image encoder's results, "none" for none. `seed` decides the order of rows and the first values of updates.
    `prompt` asks for the text of a picture that has nothing but a text.
    """

    train: tuple[str, ...] | None = None
    stage: str | None = None
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dora: bool = False
    layers: int | None = None
    lr: float | None = None
    projector_lr: float | None = None
    tower_lr: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    accumulate: int = 1
    share: bool = False
    checkpoint: bool = False
    resolution: tuple[int, ...] = ()
    replay: Data | None = None
    replay_share: float = 0.5
    eval: Data | None = None
    eval_every: int | None = None
    patience: int | None = None
    cache: str | None = None
    seed: int = 0
    prompt: str = PROMPT
    images: str | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "layers", "steps", "batch", "accumulate", "eval_every", "patience"):
            value, limit = getattr(self, name), MAX_RANK if name == "rank" else MAX_STEPS
            if not _left_out(self, name) and not (is_whole(value) and 1 <= value <= limit):
                raise OptionError(f"`{name}` is {shown(value)}, expected a whole number from 1 to {limit}.")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not _left_out(self, name) and not (is_number(value) and least <= value <= most):
                raise OptionError(f"`{name}` is {shown(value)}, expected a number from {least:g} to {most:g}.")
        for name in ("rslora", "dora", "share", "checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"`{name}` is {shown(getattr(self, name))}, expected True or False.")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 32:
            raise OptionError(f"`seed` is {shown(self.seed)}, expected a whole number from 0 to 2**32 - 1.")
        if self.stage is not None and self.stage not in STAGES:
            raise OptionError(f"`stage` is {shown(self.stage)}, expected one of {listed(STAGES)}.")
        if sum(each is not None for each in (self.epochs, self.steps, self.minutes)) > 1:
            raise OptionError("`epochs`, `steps` and `minutes` were given together; choose one.")
        if self.train is not None:
            self._check_train(self.train)
        sizes = (self.resolution,) if is_whole(self.resolution) else self.resolution
        if not isinstance(sizes, (list, tuple)):
            raise OptionError(f"`resolution` is {shown(sizes)}, expected whole numbers.")
        for size in sizes:
            check_resolution(size)
        object.__setattr__(self, "resolution", tuple(dict.fromkeys(map(int, sizes))))

    def _check_train(self, train: object) -> None:
        if isinstance(train, str) or not isinstance(train, (list, tuple)) or not train or set(train) - set(TRAINED):
            raise OptionError(f"`train` is {shown(train)}, expected some of {listed(TRAINED)}.")
        if {"lora", "full"} <= set(train):
            raise OptionError("`train` names 'lora' and 'full', which both train the decoder; choose one.")
        object.__setattr__(self, "train", tuple(part for part in TRAINED if part in train))

    def resolved(self) -> "TuneOptions":
        """The options with the presets of their stage in the place of what was not given."""
        preset = STAGES[self.stage or "adapt"]
        given = {name: value for name, value in preset.items() if getattr(self, name) is None}
        chosen = replace(self, **given)
        usual: dict[str, Any] = {
            "lr": 2e-5 if "full" in (chosen.train or ()) else 2e-4,
            "projector_lr": 2e-5,
            "tower_lr": 2e-6,
        }
        if (chosen.epochs, chosen.steps, chosen.minutes) == (None, None, None):
            usual["epochs"] = 3.0
        missing = {name: value for name, value in usual.items() if getattr(chosen, name) is None}
        return replace(chosen, **missing)

    @property
    def scale(self) -> float:
        """What an update is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def lasting(self) -> dict[str, Any]:
        """What a run cannot be taken up with other values of, as JSON takes it."""
        left_out = ("replay", "eval", "images", "cache", "prompt", "patience", "minutes", "epochs", "steps")
        return {
            each.name: list(value) if isinstance(value := getattr(self, each.name), tuple) else value
            for each in fields(self)
            if each.name not in left_out
        }


def _left_out(options: TuneOptions, name: str) -> bool:
    """Whether an option is None, and may be."""
    return getattr(options, name) is None and getattr(TuneOptions, name) is None


_RANGES = (
    ("alpha", 1e-6, 1e5),
    ("lr", 1e-12, 10),
    ("projector_lr", 1e-12, 10),
    ("tower_lr", 1e-12, 10),
    ("warmup", 0, 1),
    ("weight_decay", 0, 10),
    ("clip", 1e-6, 1e6),
    ("epochs", 1e-3, 1e6),
    ("minutes", 1e-3, 1e6),
    ("replay_share", 0, 0.95),
)
