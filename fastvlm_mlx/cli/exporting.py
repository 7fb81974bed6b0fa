"""What `convert --to` takes for targets out of Python: their options, the bar, and what is said of the result."""

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from .messages import BAR_STEPS, bar

if TYPE_CHECKING:
    from ..export.targets import Progress
    from ..storage.open import OpenModel

Precision = Annotated[
    str | None,
    typer.Option(
        help="For coreml: compute in float16, as the Neural Engine does, or float32. For onnx: matrices in float32, "
        "float16 or int8. [default: float16 for coreml, float32 for onnx]"
    ),
]
TowerBits = Annotated[
    int | None, typer.Option(help="For coreml: large weights in 8 bits, or as palettes of 6 or 4. [default: 16]")
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        help="For coreml: pixels as an 'array' of 0-1, as Apple's app has them, or as an 'image'. [default: array]",
    ),
]
WithProjector = Annotated[
    bool,
    typer.Option("--with-projector", help="For coreml: give image embeddings, not features for a projector elsewhere."),
]
Target = Annotated[
    str | None, typer.Option(help="For coreml: the oldest system, iOS16, iOS17 or iOS18. [default: iOS17]")
]
PackageResolution = Annotated[
    int | None,
    typer.Option(
        "--resolution", help="For coreml: side of its pictures in pixels, a multiple of 64. [default: the model's]"
    ),
]


class Export(Protocol):
    """Writes an open model from its folder to a place, and returns what to say of it."""

    def __call__(self, opened: "OpenModel", source: Path, out: Path, *, force: bool, progress: "Progress") -> str:
        """Write it; `progress` is told what is being done, and how much of everything is, 0-1."""


def prepare(to: str, given: Mapping[str, Any]) -> Export | None:
    """Check the options of a target out of Python; None for the targets that `convert` writes itself."""
    if to == "coreml":
        return _package(given)
    if to == "onnx":
        return _onnx(given)
    return _folder(to, given) if to in ("mlx-vlm", "mlx-lm") else None


def run(export: Export, opened: "OpenModel", source: Path, out: Path, *, force: bool) -> None:
    """Write an export with a progress bar, and say what was written."""
    with bar("Converting") as drawn:

        def progress(label: str, share: float) -> None:
            drawn.label = label
            drawn.update(int(BAR_STEPS * share) - drawn.pos)

        said = export(opened, source, out, force=force, progress=progress)
    print(said, file=sys.stderr)


def _given_to(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of a dataclass's fields."""
    return {each.name: given[each.name] for each in fields(options) if given[each.name] is not None}


def _package(given: Mapping[str, Any]) -> Export:
    from ..export import coreml
    from ..export.options import PackageOptions
    from ..export.swift import loading

    options = PackageOptions(**_given_to(PackageOptions, given))
    pictures = Path(given["pictures"]) if given["pictures"] else None

    def export(opened: "OpenModel", source: Path, out: Path, *, force: bool, progress: "Progress") -> str:
        report = coreml.write(opened, source, out, options, pictures=pictures, force=force, progress=progress)
        size = f"{report.facts['bytes'] / 1e6:,.1f} MB"
        return f"{out}: {size}, and {out.stem}.report.md beside it. In Swift:\n\n{loading(out.name)}"

    return export


def _onnx(given: Mapping[str, Any]) -> Export:
    from ..export import onnx_folder

    precision: Any = given["precision"] or "float32"
    onnx_folder.check_precision(precision)

    def export(opened: "OpenModel", source: Path, out: Path, *, force: bool, progress: "Progress") -> str:
        report = onnx_folder.write(opened, source, out, precision=precision, force=force, progress=progress)
        return f"{out}: {report.facts['bytes'] / 1e6:,.1f} MB of graphs, and report.md among them."

    return export


def _folder(to: Any, given: Mapping[str, Any]) -> Export:
    from ..export import mlx_folder

    options = mlx_folder.FolderOptions(**_given_to(mlx_folder.FolderOptions, given))

    def export(opened: "OpenModel", source: Path, out: Path, *, force: bool, progress: "Progress") -> str:
        report = mlx_folder.write(opened, source, out, to, options, force=force, progress=progress)
        return f"{out}: {report.facts['bytes'] / 1e6:,.1f} MB of weights for {to}."

    return export
