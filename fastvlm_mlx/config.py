"""A model's configuration as frozen dataclasses; config.json of our folder decides every size, and nothing else does.

Enters: the parsed config.json. Leaves: a checked `ModelConfig`. Field names are those of FastViT (timm) and Qwen2
(transformers).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, TypeVar, cast

from .errors import CheckpointError, OptionError, listed, shown

FORMAT_VERSION = 1
MODEL_TYPE = "fastvlm_mlx"
STAGES = 5
ATTENTION_STAGES = (3, 4)  # the others mix tokens with a depthwise convolution (RepMixer)
HEAD_DIM = 32  # of the tower's attention
MAX_BLOCKS = 1000  # layers of the decoder, blocks of a stage; bounds what a wrong config can make us build
MAX_MESSAGE_CHARS = 500  # characters; a key from the file may be very long
MAX_IMAGE_SIDE = 4096  # pixels of a side
STRIDE = 64  # pixels of the image per image token, along each side: stem 4, then four downsamplers of 2
RESOLUTIONS = range(STRIDE, MAX_IMAGE_SIDE + 1, STRIDE)  # sides that pictures may be brought to, in pixels

Fit = Literal["pad", "crop"]
T = TypeVar("T")
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


def check(condition: bool, message: str) -> None:
    """Raise CheckpointError with this message about config.json unless the condition holds."""
    if not condition:
        message = message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}..."
        raise CheckpointError(f"config.json: {message}; fetch or convert the model again.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of Python or NumPy; True and False do not count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of Python or NumPy; True and False do not count."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_dtype(dtype: str | None) -> None:
    """Raise OptionError unless `dtype` is one of DTYPES or None (the default)."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"`dtype` is {shown(dtype)}, expected one of {listed(DTYPES)}.")


def check_resolution(resolution: int | None) -> None:
    """Raise OptionError unless `resolution` (pixels) is one of RESOLUTIONS or None (the model's own)."""
    if resolution is not None and not (is_whole(resolution) and resolution in RESOLUTIONS):
        raise OptionError(
            f"`resolution` is {shown(resolution)}, expected a multiple of {STRIDE} from {RESOLUTIONS[0]} to "
            f"{RESOLUTIONS[-1]} pixels."
        )


def _positive(most: int = 1 << 24, /, **sizes: int) -> None:
    for name, size in sizes.items():
        valid = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= most
        check(valid, f"{name} is {shown(size)}, expected a whole number from 1 to {most}")


def _real(**values: float) -> None:
    for name, value in values.items():
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12
        check(valid, f"{name} is {shown(value)}, expected a positive number")


@dataclass(frozen=True)
class VisionConfig:
    """FastViTHD, the image encoder: blocks (`depths`) and channels (`widths`) of each of its five stages.

    Sources: FastVLM (arXiv:2412.13303), FastViT (arXiv:2303.14189). Raises CheckpointError for sizes that do not fit.
    """

    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, sizes in (("depths", self.depths), ("widths", self.widths)):
            check(len(sizes) == STAGES, f"vision {name} has {len(sizes)} entries, expected {STAGES}")
            _positive(
                MAX_BLOCKS if name == "depths" else 1 << 24,
                **{f"vision {name}[{i}]": size for i, size in enumerate(sizes)},
            )
        _positive(mlp_ratio=self.mlp_ratio)
        _real(layer_norm_eps=self.layer_norm_eps)
        for before, after in zip(self.widths, self.widths[1:], strict=False):
            check(after % before == 0, f"vision width {after} is not a whole multiple of the one before, {before}")
        for stage in ATTENTION_STAGES:
            width = self.widths[stage]
            check(width % HEAD_DIM == 0, f"vision width {width} of an attention stage is not a multiple of {HEAD_DIM}")

    @property
    def out_width(self) -> int:
        """Channels C of the features (N, C) handed to the projector: conv_exp doubles the last stage's."""
        return 2 * self.widths[-1]


@dataclass(frozen=True)
class TextConfig:
    """Qwen2, the decoder (arXiv:2407.10671), in the names of its config.json.

    Raises CheckpointError for sizes that do not fit.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        _positive(**sizes)
        _positive(MAX_BLOCKS, num_hidden_layers=self.num_hidden_layers)
        _real(rope_theta=self.rope_theta, rms_norm_eps=self.rms_norm_eps)
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        check(
            self.hidden_size % heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of its {heads} attention heads",
        )
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        check(heads % kv == 0, f"{heads} attention heads cannot share {kv} key-value heads evenly")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """Number of parameters in the decoder's matrices, embedding and head included.

        Models are named after it ("0.5B").
        """
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes a square of `size` pixels: by black bars ("pad") or a centred cut ("crop")."""

    size: int = 1024
    fit: Fit = "pad"

    def __post_init__(self) -> None:
        _positive(MAX_IMAGE_SIDE, image_size=self.size)
        check(self.fit in ("pad", "crop"), f"image fit is {shown(self.fit)}, expected 'pad' or 'crop'")

    @property
    def tokens(self) -> int:
        """Image tokens N of one picture: one per STRIDE x STRIDE pixels, the last row and column rounded up."""
        return (-(-self.size // STRIDE)) ** 2


@dataclass(frozen=True)
class QuantConfig:
    """How one layer is quantised, in MLX's terms: bits per weight, weights per scale, mode ("affine", "mxfp4", ...)."""

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True)
class SourceConfig:
    """Where the weights came from (name and layout), and the licence they are under."""

    name: str = ""
    layout: str = ""
    license: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: decoder, image encoder, picture, source, stop tokens, stored dtype, and quantised layers.

    `quantization` maps the path of a layer to its QuantConfig. Raises CheckpointError for a value outside its range.
    """

    text: TextConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    eos_token_ids: tuple[int, ...] = ()
    dtype: Dtype = "bfloat16"
    quantization: dict[str, QuantConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.dtype in DTYPES, f"dtype is {shown(self.dtype)}, expected one of {listed(DTYPES)}")
        for token in self.eos_token_ids:
            check(
                isinstance(token, int) and 0 <= token < self.text.vocab_size,
                f"stop token {shown(token)} is outside the vocabulary of {self.text.vocab_size}",
            )

    def to_dict(self) -> dict[str, Any]:
        """The object that is written to config.json of our folder."""
        return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Build the config from a parsed config.json.

        Raises CheckpointError naming an unknown, missing or mistyped entry.
        """
        data = dict(data)
        found = data.pop("model_type", None)
        check(found == MODEL_TYPE, f"model_type is {shown(found)}, expected {MODEL_TYPE!r}")
        version = data.pop("format_version", None)
        check(
            version == FORMAT_VERSION,
            f"format_version is {shown(version)}, this release of fastvlm-mlx reads {FORMAT_VERSION}, so update it",
        )
        quantization = data.pop("quantization", {})
        check(isinstance(quantization, dict), "quantization is not a table")
        return _build(
            cls,
            "",
            data
            | {
                "text": _build(TextConfig, "text.", data.get("text")),
                "vision": _build(VisionConfig, "vision.", data.get("vision", {})),
                "image": _build(ImageConfig, "image.", data.get("image", {})),
                "source": _build(SourceConfig, "source.", data.get("source", {})),
                "quantization": {
                    path: _build(QuantConfig, f"quantization.{path}.", q) for path, q in quantization.items()
                },
            },
        )


def _build(cls: type[T], prefix: str, data: Any) -> T:
    """A dataclass from a parsed JSON object.

    Unknown, missing or mistyped entries raise CheckpointError; lists become tuples. `prefix` stands before the names of
    entries in messages ("text.").
    """
    check(isinstance(data, dict), f"{prefix.rstrip('.') or 'the file'} is missing or not a table")
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    unknown = [prefix + name for name in data if name not in fields]
    check(not unknown, f"unknown entries {listed(unknown)}")
    required = (
        f for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [prefix + f.name for f in required if f.name not in data]
    check(not missing, f"missing entries {listed(missing)}")
    accepted: dict[object, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}
    accepted |= {"tuple[int, ...]": (list, tuple), "Fit": (str,), "Dtype": (str,)}
    for name, value in data.items():
        types = accepted.get(fields[name].type)
        right = types is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool)))
        check(right, f"{prefix}{name} is {shown(value)}, expected a value of type {fields[name].type}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
