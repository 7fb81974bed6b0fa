"""Training form -> published form: parallel branches and batch norms merged into the one convolution they add up to.

Computed in float32. Kernels are (O, I/groups, k, k), as PyTorch stores them. Sources: RepVGG (arXiv:2101.03697),
MobileOne (arXiv:2206.04040), RepLKNet (arXiv:2203.06717), FastViT (arXiv:2303.14189); apple/ml-fastvlm,
mobileclip/mci.py at 592b4ad.
"""

import mlx.core as mx

BATCH_NORM_EPS = 1e-5

Tensors = dict[str, mx.array]


def batch_norm(parts: Tensors) -> tuple[mx.array, mx.array]:
    """Scale and shift (C,) of a batch norm with fixed statistics."""
    w = {name: part.astype(mx.float32) for name, part in parts.items()}
    scale = w["weight"] * mx.rsqrt(w["running_var"] + BATCH_NORM_EPS)
    return scale, w["bias"] - w["running_mean"] * scale


def mobile_one(parts: Tensors) -> Tensors:
    """Merge a convolution with its 1x1 branch and its identity branch, where they exist; each has a batch norm."""
    kernel, bias = _conv_bn(_inside(parts, "rbr_conv.0"))
    if scale := _inside(parts, "rbr_scale"):
        small, shift = _conv_bn(scale)
        kernel, bias = kernel + _centred(small, kernel.shape[-1]), bias + shift
    if skip := _inside(parts, "rbr_skip"):
        gain, shift = batch_norm(skip)
        kernel, bias = kernel + gain[:, None, None, None] * _identity(kernel.shape), bias + shift
    return {"weight": kernel, "bias": bias}


def rep_mixer(parts: Tensors) -> Tensors:
    """Merge x + layer_scale * (mixer(x) - norm(x)), where norm is a batch norm alone."""
    mixer = mobile_one(_inside(parts, "mixer"))
    gain, shift = batch_norm(_inside(parts, "norm.rbr_skip"))
    identity = _identity(mixer["weight"].shape)
    layer_scale = parts["layer_scale"].astype(mx.float32).reshape(-1)
    change = mixer["weight"] - gain[:, None, None, None] * identity
    return {
        "weight": identity + layer_scale[:, None, None, None] * change,
        "bias": layer_scale * (mixer["bias"] - shift),
    }


def large_kernel(parts: Tensors) -> Tensors:
    """Merge a large and a small convolution side by side, each with a batch norm."""
    kernel, bias = _conv_bn(_inside(parts, "lkb_origin"))
    small, shift = _conv_bn(_inside(parts, "small_conv"))
    return {"weight": kernel + _centred(small, kernel.shape[-1]), "bias": bias + shift}


def rep_cpe(parts: Tensors) -> Tensors:
    """Merge x + conv(x)."""
    kernel = parts["weight"].astype(mx.float32)
    return {"weight": kernel + _identity(kernel.shape), "bias": parts["bias"].astype(mx.float32)}


def _inside(parts: Tensors, prefix: str) -> Tensors:
    return {name[len(prefix) + 1 :]: part for name, part in parts.items() if name.startswith(prefix + ".")}


def _conv_bn(parts: Tensors) -> tuple[mx.array, mx.array]:
    scale, shift = batch_norm(_inside(parts, "bn"))
    return parts["conv.weight"].astype(mx.float32) * scale[:, None, None, None], shift


def _centred(kernel: mx.array, size: int) -> mx.array:
    margin = (size - kernel.shape[-1]) // 2
    return mx.pad(kernel, [(0, 0), (0, 0), (margin, margin), (margin, margin)])


def _identity(shape: tuple[int, ...]) -> mx.array:
    """The kernel (O, I, k, k) of the identity: output o is input o, counted within its group."""
    out, per_group, size, _ = shape
    taken = (mx.arange(out) % per_group)[:, None] == mx.arange(per_group)
    return _centred(taken.astype(mx.float32)[:, :, None, None], size)
