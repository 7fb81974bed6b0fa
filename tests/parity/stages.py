"""The two sides of a parity test: one picture for both, what each computes from it, and how far they are apart.

Tolerances are relative to the largest value: float32 sums in another order, through up to 46 blocks and 24 layers,
differ by a few 1e-6; 1e-4 is what the project promises.
"""

import mlx.core as mx
import numpy as np
import torch

from fastvlm_mlx.network.model import LEVELS, FastVLM

from .original import Original

TOLERANCE = 1e-4
TIGHT = 2e-5  # what is in fact reached, so that a real mistake of this size does not hide below the promise


def difference(ours: mx.array, theirs: torch.Tensor) -> float:
    """max |difference| / max |value|."""
    a, b = np.array(ours.astype(mx.float32)), theirs.detach().float().numpy()
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A random image (1, H, W, 3) uint8, smooth enough to have some structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (1, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def to_torch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(LEVELS[image]).permute(0, 3, 1, 2)


@torch.no_grad()
def features_of(theirs: Original, image: np.ndarray) -> torch.Tensor:
    features: torch.Tensor = theirs.model.vision_tower(to_torch(image)).last_hidden_state
    return features.flatten(2).transpose(1, 2)


def features_from(ours: FastVLM, image: np.ndarray) -> mx.array:
    """Our features with their channels in the published order: ours come filter by filter, theirs channel by
    channel."""
    features = ours.vision(mx.array(LEVELS[image]).astype(ours.dtype))
    B, N, C = features.shape
    return features.reshape(B, N, 2, C // 2).swapaxes(2, 3).reshape(B, N, C)


def prompt_embeddings(theirs: Original, image: np.ndarray, before: list[int], after: list[int]) -> torch.Tensor:
    embed = theirs.model.language_model.embed_tokens
    picture = theirs.model.get_image_features(to_torch(image)).pooler_output
    return torch.cat([embed(torch.tensor([before])), picture, embed(torch.tensor([after]))], dim=1)
