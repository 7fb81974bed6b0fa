"""A model's image encoder -> a Core ML package (.mlpackage) for the Neural Engine, with a report beside it.

fastvithd.mlpackage  fastvithd.report.json  fastvithd.report.md

Names, shapes and the order of channels are those of apple/ml-fastvlm, model_export/export_vision_encoder.py at 592b4ad:
pixels `images` (1, 3, S, S), RGB, 0-1, to `image_features` (1, N, C), row by row of the grid, channels as Apple's
projector reads them.
"""

import math
import os
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx

from .. import progress as progress_
from ..config import ModelConfig
from ..convert.pipeline import check_place
from ..convert.published import shapes
from ..decoding.loading import open_model
from ..errors import OptionError, shown, warn
from ..hub.find import find
from ..hub.licence import announce
from ..storage.open import OpenModel
from ..storage.place import check_target, new_folder, target_of
from . import coremltools, estimate, mil, ranges
from .encoder import read_encoder
from .options import InputKind, PackageOptions, Precision, System
from .package import PACKAGE, SUFFIX, write_package
from .pictures import measured_on
from .ranges import Ranges, Scales
from .report import Report, Section
from .rules import Rule
from .swift import loading
from .targets import Progress

ROUGH_BITS = 4
ROUGH = "A palette of 4 bits changes answers; `tower_bits=8` and `tower_bits=6` are safer."
STEPS = 100  # of the bar


def convert_to_coreml(
    input_dir: str | os.PathLike[str],
    output_file: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    precision: Precision = "float16",
    tower_bits: int | None = None,
    input: InputKind = "array",  # noqa: A002  (what it is called for people who write Core ML)
    with_projector: bool = False,
    target: System = "iOS17",
    pictures: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write the image encoder of a model as a Core ML package for the Neural Engine; returns the package's path.

    `input_dir` is a folder of any accepted layout, a Hub name or 'tiny'; `output_file` ends in .mlpackage. `resolution`
    is the side of its pictures in pixels, a multiple of 64, by default the model's own. `precision` is "float16", which
    the Neural Engine computes in, or "float32". `tower_bits` stores the large weights in 8 bits, or as palettes of 6 or
    4. `input` is "array" (pixels 0-1, (1, 3, S, S) float32) or "image". With the projector, image embeddings come out
    instead of features. `target` is the oldest system that shall load it: "iOS16", "iOS17" or "iOS18", or the macOS of
    the same year. `pictures` is a folder to measure the range of float16 on, by default built-in drawings and noise.
    With `force`, a package of that name is replaced. A report is written beside the package. Needs the extra 'coreml'.
    Raises FastVLMError; nothing is left half-written.
    """
    options = PackageOptions(resolution, precision, tower_bits, input, with_projector, target)
    out = target_of(output_file)
    check_suffix(out)
    found = find(input_dir)
    with progress_.bar("Converting", STEPS) as track:
        steps, done = track(range(STEPS)), 0

        def progress(_: str, share: float) -> None:
            nonlocal done
            done += len(list(islice(steps, max(0, int(share * STEPS) - done))))

        opened = open_model(found, name=found.title)
        folder = None if pictures is None else Path(pictures)
        write(opened, found.folder, out, options, pictures=folder, force=force, progress=progress)
    return out


def check_suffix(out: Path) -> None:
    """Raise OptionError unless a package can have this name."""
    if out.suffix != SUFFIX:
        raise OptionError(f"`out` is {shown(str(out))}, expected the name of a package, which ends in {SUFFIX}.")


def write(
    opened: OpenModel,
    folder: Path,
    out: Path,
    options: PackageOptions,
    *,
    pictures: Path | None = None,
    force: bool = False,
    progress: Progress = lambda label, share: None,
) -> Report:
    """Write the image encoder of a model opened from `folder` as a Core ML package, and a report beside it; returns the
    report.

    `pictures` is a folder to measure the range of float16 on, see `pictures.measured_on`. Raises OptionError,
    ImageError, CheckpointError where float16 cannot hold the model, and OutputError; nothing is left half-written.
    """
    check_suffix(out)
    check_place(folder, out)
    config = opened.resolve()
    if options.resolution is not None:
        config = replace(config, image=replace(config.image, size=int(options.resolution)))
    nbytes = _nbytes(config, options)
    check_target(out, nbytes, force, own=PACKAGE)
    coremltools.load()
    images, named = measured_on(opened, config.image, pictures) if options.half else ([], "")
    if options.tower_bits == ROUGH_BITS:
        warn(ROUGH)
    announce(config.source.license)

    progress("Reading weights", 0.0)
    encoder = read_encoder(opened, config)
    found, scales = None, ranges.unscaled(config.vision)
    if options.half:
        found = ranges.measure(
            encoder, config.vision, images, lambda done, total: progress("Measuring ranges", 0.1 + 0.3 * done / total)
        )
        scales = ranges.choose(found, config.vision, with_projector=options.with_projector)
    with new_folder(out, nbytes, force, own=PACKAGE) as partial:
        progress("Writing", 0.4)
        kept = write_package(encoder, config, scales, options, source=folder, into=partial)
        progress("Comparing", 0.7)
        compared = None
        if options.half:
            compared = estimate.compare(encoder, mx.array(images[0])[None], options)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    report = Report(
        "coreml", config.source.name, out.name,
        _facts(config, options, out, size, found, named, scales, kept, compared),
        [_of_package(config, options, size), _of_parity(compared), *_of_ranges(config, found, named, scales),
         _of_rules(kept),
         Section("In Swift", f"```swift\n{loading(out.name)}```")],
    )  # fmt: skip
    report.write(out.with_suffix(".report"))
    progress("Comparing", 1.0)
    return report


def _nbytes(config: ModelConfig, options: PackageOptions) -> int:
    """About how large a package gets, in bytes."""
    parts = ("vision.", "projector.") if options.with_projector else ("vision.",)
    elements = sum(math.prod(shape) for name, shape in shapes(config).items() if name.startswith(parts))
    return elements * options.bits // 8


def _output_shape(config: ModelConfig, options: PackageOptions) -> list[int]:
    return [1, config.image.tokens, config.text.hidden_size if options.with_projector else config.vision.out_width]


def _facts(
    config: ModelConfig,
    options: PackageOptions,
    out: Path,
    size: int,
    found: Ranges | None,
    named: str,
    scales: Scales,
    kept: list[Rule],
    compared: estimate.Comparison | None,
) -> dict[str, object]:
    """What programs read of the report."""
    side = config.image.size
    measured = found and {
        "pictures": named,
        "count": found.pictures,
        "streams": found.streams(config.vision),
        "stream_scales": list(scales.streams),
        "norm_scales": scales.norms,
        "mean_scale": scales.mean,
        "largest": dict(zip(("layer", "value"), found.largest, strict=True)),
    }
    return {
        "file": out.name,
        "bytes": size,
        "licence": config.source.license,
        "options": asdict(options),
        "input": {"name": mil.INPUT, "shape": [1, 3, side, side], "fit": config.image.fit},
        "output": {"name": mil.OUTPUT, "shape": _output_shape(config, options)},
        "comparison": compared and asdict(compared),
        "ranges": measured,
        "rules": [asdict(rule) for rule in kept],
    }


def _of_package(config: ModelConfig, options: PackageOptions, size: int) -> Section:
    side = config.image.size
    shape = ", ".join(map(str, _output_shape(config, options)))
    rows = [
        ("input", f"`{mil.INPUT}` (1, 3, {side}, {side}), RGB, " + ("0-1" if options.input == "array" else "8 bits")),
        ("output", f"`{mil.OUTPUT}` ({shape}), " + ("image embeddings" if options.with_projector else "features")),
        ("runs on", f"{options.target} and later"),
        ("licence of the weights", config.source.license),
    ]
    return Section("The package", f"{size / 1e6:,.1f} MB, {options.stored}.", rows)


def _of_parity(compared: estimate.Comparison | None) -> Section:
    text = "Every weight and every result is float32: nothing is rounded."
    if compared is not None:
        text = (
            f"On the first picture, {compared.how}: the largest difference of a feature is "
            f"{compared.difference:.1e} of the largest feature, the worst cosine of a token {compared.cosine:.6f}."
        )
    return Section("Against MLX in float32", f"{text} Core ML itself runs on Macs only and was not asked.")


def _of_ranges(config: ModelConfig, found: Ranges | None, named: str, scales: Scales) -> list[Section]:
    if found is None:
        return []
    layer, value = found.largest
    rows = [
        (f"residual stream of stage {stage}", f"{largest:,.1f}, stored divided by {scale:g}")
        for stage, (largest, scale) in enumerate(zip(found.streams(config.vision), scales.streams, strict=True))
    ]
    text = f"Measured on {found.pictures} pictures: {named}. float16 ends at {ranges.FLOAT16_MAX:,.0f}."
    return [Section("Ranges", text, [*rows, ("largest result of a layer", f"{value:,.1f} ({layer})")])]


def _of_rules(kept: list[Rule]) -> Section:
    text = "What is known to keep a program off the engine; on a Mac, `MLComputePlan` tells where each operation runs."
    rows = [(rule.name, f"{'kept' if rule.kept else 'NOT kept'}: {rule.found}") for rule in kept]
    return Section("Rules of the Neural Engine", text, rows)
