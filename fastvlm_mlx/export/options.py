"""What can be asked of a Core ML package, checked."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..config import check_resolution
from ..errors import OptionError, listed, shown

Precision = Literal["float32", "float16"]
InputKind = Literal["array", "image"]
System = Literal["iOS16", "iOS17", "iOS18"]
TOWER_BITS = (8, 6, 4)


@dataclass(frozen=True)
class PackageOptions:
    """How a package is written; raises OptionError for an option outside its range.

    `resolution` is the side of its pictures in pixels, a multiple of 64, None for the model's own. `precision` is what
    it computes in: "float16", which the Neural Engine takes, or "float32". `tower_bits` are those of large weights: 8,
    or 6 or 4 as palettes, None for 16. Pixels come as an "array" of 0-1 or as an "image". With the projector, image
    embeddings come out, not features. `target` is the oldest system that shall load it.
    """

    resolution: int | None = None
    precision: Precision = "float16"
    tower_bits: int | None = None
    input: InputKind = "array"
    with_projector: bool = False
    target: System = "iOS17"

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        for name, known in (("precision", Precision), ("input", InputKind), ("target", System)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise OptionError(f"`{name}` is {shown(value)}, expected one of {listed(get_args(known))}.")
        if self.tower_bits is not None and (isinstance(self.tower_bits, bool) or self.tower_bits not in TOWER_BITS):
            raise OptionError(f"`tower_bits` is {shown(self.tower_bits)}, expected one of {listed(TOWER_BITS)}.")
        if self.tower_bits is not None and self.precision != "float16":
            raise OptionError(
                "`tower_bits` needs `precision='float16'`, which small weights are turned back into; leave one out."
            )
        if not isinstance(self.with_projector, bool):
            raise OptionError(f"`with_projector` is {shown(self.with_projector)}, expected True or False.")

    @property
    def half(self) -> bool:
        """Whether it computes in float16."""
        return self.precision == "float16"

    @property
    def stored(self) -> str:
        """What weights are stored in, in words."""
        return self.precision + (f", large weights in {self.tower_bits} bits" if self.tower_bits else "")

    @property
    def bits(self) -> int:
        """Bits of a large weight."""
        return self.tower_bits or (16 if self.half else 32)
