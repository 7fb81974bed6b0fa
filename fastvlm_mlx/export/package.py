"""An encoder -> a Core ML package in a folder: converted, described, written and looked through."""

import os
import shutil
from pathlib import Path
from typing import Any

from ..config import STRIDE, ModelConfig
from ..convert.card import licence_text
from ..errors import OutputError, shown
from ..storage.place import Own
from ..version import __version__
from . import coremltools, mil, rules
from .encoder import Encoder, published
from .options import PackageOptions
from .ranges import Scales

SUFFIX = ".mlpackage"
FOLDER_MODE, FILE_MODE = 0o755, 0o644  # coremltools keeps everybody else from reading what it writes


def _is_package(folder: Path) -> bool:
    return folder.suffix == SUFFIX and (folder / "Manifest.json").is_file()


PACKAGE = Own("a Core ML package", _is_package)


def write_package(
    encoder: Encoder, config: ModelConfig, scales: Scales, options: PackageOptions, *, source: Path, into: Path
) -> list[rules.Rule]:
    """Fill an empty folder with the package of an encoder; returns how it keeps the Neural Engine's rules.

    `source` is the folder whose licence is passed on. Raises OptionError without coremltools, CheckpointError where
    float16 cannot hold the weights, OutputError where the folder cannot be written.
    """
    package = _converted(encoder, config, scales, options)
    _describe(package, config, options, source)
    _save(package, into)
    return rules.check(package.get_spec())


def _converted(encoder: Encoder, config: ModelConfig, scales: Scales, options: PackageOptions) -> Any:
    """The package in memory."""
    ct = coremltools.load()
    oldest = getattr(ct.target, options.target)
    with coremltools.quiet():
        program = mil.program(published(encoder, config), config, scales, options, oldest)
        images = ct.TensorType(mil.INPUT, (1, 3, config.image.size, config.image.size))
        if options.input == "image":
            images = ct.ImageType(mil.INPUT, images.shape, color_layout=ct.colorlayout.RGB)
        return ct.convert(
            program, convert_to="mlprogram", inputs=[images], minimum_deployment_target=oldest, skip_model_load=True,
            compute_precision=ct.precision.FLOAT32,  # the program says itself what is float16
            pass_pipeline=ct.PassPipeline.EMPTY,
        )  # fmt: skip


def _describe(package: Any, config: ModelConfig, options: PackageOptions, source: Path) -> None:
    """What Xcode shows of a package: whose it is, on what terms, what goes in and what comes out."""
    size, tokens, name = config.image.size, config.image.tokens, config.source.name
    package.author = name
    package.license = licence_text(source, config)
    package.short_description = (
        f"FastViTHD, the image encoder of {name}, for pictures of {size} x {size} pixels: {tokens} tokens. Converted "
        f"by fastvlm-mlx {__version__} in {options.stored}: batch norms, layer scales and branches are "
        "folded; nothing was trained."
    )
    package.version = __version__
    package.user_defined_metadata["fastvlm.fit"] = config.image.fit
    package.user_defined_metadata["fastvlm.licence"] = config.source.license
    package.input_description[mil.INPUT] = f"A picture of {size} x {size} pixels, RGB."
    package.output_description[mil.OUTPUT] = (
        f"{tokens} tokens, row by row of a grid of {STRIDE} x {STRIDE} pixels each."
    )


def _save(package: Any, into: Path) -> None:
    """Write the package's files, readable by everybody."""
    inner = into / f"package{SUFFIX}"
    try:
        with coremltools.quiet():
            package.save(str(inner))
    except RuntimeError as error:
        raise OutputError(
            f"{into.parent} cannot take the package ({shown(str(error))}); make room, or choose another `out`."
        ) from error
    for entry in inner.iterdir():
        shutil.move(entry, into / entry.name)
    inner.rmdir()
    into.chmod(FOLDER_MODE)
    for folder, folders, files in os.walk(into):
        for name in folders:
            (Path(folder) / name).chmod(FOLDER_MODE)
        for name in files:
            (Path(folder) / name).chmod(FILE_MODE)
