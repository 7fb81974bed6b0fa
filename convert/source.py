"""A checkpoint mapped by its layout's table: its tensors under the names of the published form."""

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from fastvlm_mlx.config import Fit, ModelConfig
from fastvlm_mlx.errors import CheckpointError, OptionError, about_its_path, listed
from fastvlm_mlx.storage.open import is_ours

from . import packed
from .config_map import from_llava, from_transformers
from .key_map import LAYOUTS, check_layout, match, recognise, source_name
from .published import Shapes
from .read import Checkpoint, read_checkpoint
from .rows import Plan

TOWER = "vision."
FLOATING = ("F32", "F16", "BF16")


class Source(NamedTuple):
    """A checkpoint, its layout, the assignment of its names, and which of its layers are quantised and how."""

    checkpoint: Checkpoint
    layout: str
    plan: Plan
    quantization: packed.Plan

    def config(self, name: str, fit: Fit | None = None) -> ModelConfig:
        """The checkpoint's settings as our config, with `fit` instead of its own if given.

        Raises CheckpointError for settings that are not supported.
        """
        read = from_transformers if self.layout.startswith("transformers") else from_llava
        return read(self.checkpoint.config, self.checkpoint.folder, name=name, layout=self.layout, fit=fit)

    def name_of(self, target: str) -> str:
        """The checkpoint's name of a tensor of the published form."""
        return source_name(target, self.layout)

    def shapes(self) -> Shapes:
        """Shapes of the published form, from the headers alone.

        Raises CheckpointError for parts that do not fit each other.
        """
        headers = self.checkpoint.tensors
        shapes = {target: _turned(headers[source].shape, axes) for target, (source, axes) in self.plan.renames.items()}
        dtypes = {target: headers[source].dtype for target, (source, _) in self.plan.renames.items()}
        shapes = packed.unpacked_shapes(shapes, dtypes, self.quantization, self.plan.names())
        for group in self.plan.merges:
            zeros = {part: mx.zeros(headers[name].shape) for part, name in group.parts.items()}
            try:
                merged = group.row.merge(zeros)  # unevaluated: only shapes are worked out
            except (ValueError, IndexError, KeyError) as error:
                raise CheckpointError(f"the tensors under {group.source!r} do not fit each other ({error}).") from error
            shapes |= {f"{group.target}.{part}": tuple(array.shape) for part, array in merged.items()}
        return shapes

    def tensors(self) -> dict[str, mx.array]:
        """The published form's tensors, unevaluated; dropped tensors are not kept in memory."""
        arrays = self.checkpoint.load()
        tensors = {}
        for target, (source, axes) in self.plan.renames.items():
            array = arrays.pop(source)
            tensors[target] = array.transpose(axes) if axes else array
        for group in self.plan.merges:
            merged = group.row.merge({part: arrays.pop(name) for part, name in group.parts.items()})
            tensors |= {f"{group.target}.{part}": array for part, array in merged.items()}
        return tensors

    @property
    def has_tower(self) -> bool:
        """Whether the image encoder is among the weights."""
        return any(
            target.startswith(TOWER) for target in (*self.plan.renames, *(group.target for group in self.plan.merges))
        )

    def tower(self) -> "Source":
        """The image encoder alone."""
        renames = {target: renamed for target, renamed in self.plan.renames.items() if target.startswith(TOWER)}
        merges = [group for group in self.plan.merges if group.target.startswith(TOWER)]
        quantization = {layer: q for layer, q in self.quantization.items() if layer.startswith(TOWER)}
        return self._replace(plan=Plan(renames, merges, {}), quantization=quantization)


@about_its_path
def open_source(folder: Path, layout: str | None = None) -> Source:
    """Open a checkpoint of `layout`, or of the layout recognised; its names are all matched, its weights not read.

    Raises CheckpointError, and OptionError for a layout that does not exist.
    """
    check_layout(layout)
    checkpoint = read_checkpoint(folder)
    layout = layout or recognise(checkpoint.tensors, checkpoint.config.get("model_type"))
    plan = match(checkpoint.tensors, layout)
    source = Source(checkpoint, layout, plan, packed.settings(checkpoint.config, plan.names()))
    _check_dtypes(source)
    return source


def open_tower(folder: Path | None, source: Source) -> Source | None:
    """The image encoder in `folder`, for a checkpoint that has none; None where it has its own.

    Raises CheckpointError where it is needed and not given, and OptionError where it is given and not needed.
    """
    if source.has_tower:
        if folder is not None:
            raise OptionError(
                f"{source.checkpoint.folder} has its own image encoder; give `vision_from` only for exports without "
                "one."
            )
        return None
    if folder is None and LAYOUTS[source.layout].has_tower:
        raise CheckpointError(
            f"{source.checkpoint.folder}: the image encoder is missing from its weights, as training leaves it out "
            "where it was frozen; convert it with `vision_from` and a folder that has the encoder, such as the "
            "checkpoint it was trained from."
        )
    if folder is None:
        raise CheckpointError(
            f"{source.checkpoint.folder}: an export for Apple's app holds the decoder and the projector only, its "
            "image encoder is a Core ML package; convert it with `vision_from` and a folder that has the encoder, "
            "such as the checkpoint it is from."
        )
    if is_ours(folder):
        raise CheckpointError(f"{folder} is converted already; give `vision_from` the checkpoint as published.")
    tower = open_source(folder)
    if not tower.has_tower:
        raise CheckpointError(f"{folder} has no image encoder either; give `vision_from` the checkpoint as published.")
    return tower.tower()


def _check_dtypes(source: Source) -> None:
    """Raise CheckpointError for weights stored as integers without scales."""
    packed_here = {f"{layer}.{part}" for layer in source.quantization for part in packed.PARTS}
    names = [renamed.source for target, renamed in source.plan.renames.items() if target not in packed_here]
    names += [name for group in source.plan.merges for name in group.parts.values()]
    whole = sorted(name for name in names if source.checkpoint.tensors[name].dtype not in FLOATING)
    if whole:
        raise CheckpointError(
            f"{source.checkpoint.folder}: {listed(whole)} {'is' if len(whole) == 1 else 'are'} stored as "
            f"{listed(sorted({source.checkpoint.tensors[name].dtype for name in whole}))} without the scales that "
            "would say what numbers they stand for; save the model in bfloat16, and quantise it here (`bits`)."
        )


def _turned(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with its axes in another order; as it is where it has another number of them."""
    return tuple(shape[axis] for axis in axes) if len(axes) == len(shape) else shape
