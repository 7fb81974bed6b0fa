"""Run by a Python that has mlx-vlm: a folder is loaded strictly, and what its tower and its decoder give is saved.

    python mlx_vlm_features.py FOLDER INPUTS.npz OUTPUTS.npz

Inputs: pixels (B, H, W, 3), 0-1, and ids (B, L). Outputs: embeddings (B, N, D) and logits (B, L, V), float32.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.utils import load_model

folder, given, out = map(Path, sys.argv[1:])
model = load_model(folder, lazy=True)
inputs = np.load(given)
pixels, ids = mx.array(inputs["pixels"]), mx.array(inputs["ids"])
_, found, _ = model.vision_tower(pixels)
B, H, W, C = found.shape
embeddings = model.mm_projector(found.reshape(B, H * W, C))
logits = model.language_model(ids).logits
np.savez(out, embeddings=np.array(embeddings.astype(mx.float32)), logits=np.array(logits.astype(mx.float32)))
