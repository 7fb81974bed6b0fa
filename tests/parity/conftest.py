"""Make PyTorch's side importable: PyPI's torchvision fails beside a CPU build of torch until two operators are
declared."""

import os

import torch

os.environ["TIMM_FUSED_ATTN"] = "0"  # read by timm at import: the attention written out, as in the paper

try:
    import torchvision
except RuntimeError:
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
