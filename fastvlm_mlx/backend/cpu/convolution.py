"""Depthwise convolution on a CPU as a banded matrix product, a strip of rows at a time."""

import mlx.core as mx

from .cores import streams

# Outputs of a row computed by one product: the band is TILE wide, its waste and the copied input balance there.
TILE = 16
WINDOWS = 1 << 21  # elements of input windows laid out at a time: ten times the input they are taken from
LITTLE = 1 << 18  # elements of windows that are not worth cutting


def depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Centred depthwise convolution, k odd: x (B, H, W, C), weight (C, k, k, 1) -> (B, ceil(H/s), ceil(W/s), C).

    A row of `tile` outputs depends on `span` inputs in each of k rows, through a band matrix that holds the kernel's
    row shifted by `stride` from one output to the next. Per channel that is one (rows, k * span) @ (k * span, tile)
    product. Strips of rows go to all cores. Unlike MLX's own loop it is also safe for maps smaller than the kernel. All
    of it is MLX's own operations, which have gradients.
    """
    B, H, W, C = x.shape
    k = weight.shape[1]
    p = k // 2
    out_h, out_w = -(-H // stride), -(-W // stride)
    tile = min(TILE, out_w)
    tiles = -(-out_w // tile)
    span = (tile - 1) * stride + k
    width = (tiles * tile - 1) * stride + k
    channels = x.transpose(3, 0, 1, 2)

    # Row t of the band is the kernel's row moved right by t * stride. Repeating the row with period span + stride and
    # reading it in lines of span elements does just that.
    row = mx.pad(weight[..., 0], [(0, 0), (0, 0), (0, span + stride - k)])
    lines = mx.broadcast_to(row[:, :, None], (C, k, tile, span + stride)).reshape(C, k, -1)
    band = lines[..., : tile * span].reshape(C, k, tile, span).transpose(0, 1, 3, 2).reshape(C, k * span, tile)

    strips, cores = [], streams()
    step = strip_rows(out_h, B * tiles * k * span * C, len(cores))
    for number, first in enumerate(range(0, out_h, step)):
        rows = min(step, out_h - first)
        with mx.stream(cores[number % len(cores)]):
            top = first * stride - p
            end = top + (rows - 1) * stride + k
            edges = (max(0, -top), max(0, end - H)), (p, max(0, width - W - p))
            planes = mx.pad(channels[:, :, max(0, top) : min(end, H)], [(0, 0), (0, 0), *edges])
            height, line = planes.shape[2:]
            strides = (B * height * line, height * line, stride * line, tile * stride, line, 1)
            windows = mx.as_strided(planes, (C, B, rows, tiles, k, span), strides).reshape(
                C, B * rows * tiles, k * span
            )
            strip = (windows @ band).reshape(C, B, rows, tiles * tile)[..., :out_w]
            strips.append(mx.contiguous(strip.transpose(1, 2, 3, 0)))
    return mx.concatenate(strips, axis=1) if len(strips) > 1 else strips[0]


def strip_rows(rows: int, windows: int, cores: int) -> int:
    """Rows of outputs at a time, of so many in all that each take `windows` elements: as many strips for each core."""
    if rows * windows <= LITTLE:
        return rows
    strips = -(-rows * windows // WINDOWS)
    return -(-rows // (-(-strips // cores) * cores))
