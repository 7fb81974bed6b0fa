"""A training state small enough to keep beside the code: weights in float16, no optimizer moments, safetensors.

``python -m training.compact --state runs/tiny/state-before-decay.pt --out training/tiny.safetensors`` writes one;
``python -m training.train --run runs/tiny --resume training/tiny.safetensors`` goes on from it, with a fresh optimizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PARTS = ("model", "auxiliary")


def shrink(tensor: Tensor) -> Tensor:
    """Matrices and filters in float16; vectors (norms, biases, batch-norm statistics) and counters as they are."""
    return (tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor).contiguous()


def write(state: dict[str, Any], path: Path) -> None:
    """Keep the weights of a state of ``train.py``."""
    weights = dict(state["model"])
    if torch.equal(weights["decoder.lm_head.weight"], weights["decoder.model.embed_tokens.weight"]):
        del weights["decoder.lm_head.weight"]  # tied
    tensors = {f"model/{name}": shrink(tensor) for name, tensor in weights.items()}
    tensors |= {f"auxiliary/{name}": shrink(tensor) for name, tensor in state["auxiliary"].items()}
    about = {"config": state["config"], "step": str(state["step"]), "pictures": str(state["pictures"])}
    save_file(tensors, path, metadata=about)


def read(path: Path) -> dict[str, Any]:
    """A state for ``train.py``: everything but "optimizer"."""
    state: dict[str, Any] = {part: {} for part in PARTS}
    with safe_open(path, "pt") as file:
        about = file.metadata()
        for key in file.keys():  # noqa: SIM118  (not a dictionary)
            part, name = key.split("/", 1)
            tensor = file.get_tensor(key)
            state[part][name] = tensor.float() if tensor.is_floating_point() else tensor
    state["model"]["decoder.lm_head.weight"] = state["model"]["decoder.model.embed_tokens.weight"]
    return state | {"config": about["config"], "step": int(about["step"]), "pictures": int(about["pictures"])}


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="a state of training.train")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    args = parser.parse_args()
    write(torch.load(args.state, weights_only=True), args.out)


if __name__ == "__main__":
    main()
