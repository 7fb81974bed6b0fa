"""The image encoder of an open model, without its decoder: a network in float32 to measure, and its tensors to write
elsewhere.

Enters: an `OpenModel`. Leaves: an `Encoder`, and its weights under Apple's names, in PyTorch's order of axes (O, I /
groups, k, k).
"""

from collections.abc import Iterator
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from ..config import ModelConfig
from ..convert import packed, unfold
from ..convert.fold import Tensors
from ..errors import CheckpointError, listed
from ..network.model import LEVELS
from ..network.projector import Projector
from ..network.vision import FastViTHD
from ..storage.fill import check_finite
from ..storage.open import OpenModel

Weights = npt.NDArray[np.float32]
PARTS = ("vision.", "projector.")
UNCHANGING = (".bn.", ".layer_scale")  # what folding has left of them changes nothing


class Encoder(nn.Module):
    """Tower and projector of a model, in float32, for the default device."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.vision = FastViTHD(config.vision)
        self.projector = Projector(config.vision.out_width, config.text.hidden_size)

    def features(self, pixels: mx.array) -> mx.array:
        """Features (B, N, C) of pixels (B, H, W, 3), RGB, uint8; channels in the published order, channel by
        channel."""
        return unfold.by_channel(self.vision(mx.array(LEVELS)[pixels]), 2)

    def embeddings(self, pixels: mx.array) -> mx.array:
        """Image embeddings (B, N, D) of pixels (B, H, W, 3), RGB, uint8."""
        return self.projector(self.vision(mx.array(LEVELS)[pixels]))

    def flat_parameters(self) -> dict[str, mx.array]:
        """Every parameter by its path, as our folder names it."""
        return dict(tree_flatten(self.parameters()))


def changes_nothing(name: str) -> bool:
    """Whether a tensor of this published name is a norm or a scale that folding has left without effect."""
    return any(part in name for part in UNCHANGING)


def read_encoder(opened: OpenModel, config: ModelConfig) -> Encoder:
    """Read tower and projector of an open model, quantised layers as the values they stand for.

    Raises CheckpointError for weights that are missing, misshapen or not finite.
    """
    tensors = {name: array for name, array in opened.weights() if name.startswith(PARTS)}
    packed.unpack(tensors, {layer: q for layer, q in config.quantization.items() if layer.startswith(PARTS)})
    encoder = Encoder(config)
    parameters = encoder.flat_parameters()
    wrong = parameters.keys() ^ tensors.keys() or {
        path for path, parameter in parameters.items() if tensors[path].shape != parameter.shape
    }
    if wrong:
        raise CheckpointError(
            f"{opened.name}: {listed(sorted(wrong))} are not what its config.json calls for; convert it again."
        )
    for name in list(tensors):
        array = tensors.pop(name)
        exact = array.astype(mx.float32)
        check_finite(opened.name, [(name, exact, array)])
        encoder.load_weights([(name, exact)], strict=False)
    return encoder


def published(encoder: Encoder, config: ModelConfig) -> Iterator[tuple[str, Weights]]:
    """Yield the encoder's tensors under their published names, but for norms and scales that change nothing."""
    tensors = encoder.flat_parameters()
    tower, projector = Tensors(tensors, "vision"), Tensors(tensors, "projector")
    for name, array in chain(unfold.tower(tower, config.vision), unfold.projector(projector)):
        if not changes_nothing(name):
            yield name, np.array(array, dtype=np.float32)
