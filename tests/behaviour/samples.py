"""TIFFs of any layout, made sample by sample."""

import struct
import zlib
from typing import Any

import numpy as np


def tiff(
    samples: np.ndarray,
    *,
    photometric: int,
    bits: int,
    order: str = "<",
    kind: int = 1,
    planar: bool = False,
    deflate: bool = False,
    predictor: int = 1,
    rows: int | None = None,
    tile: int | None = None,
    reverse: bool = False,
    **more: Any,
) -> bytes:
    """`samples` (H, W, S) as they are to be stored; `more` are tags by number ("t338")."""
    height, width, count = samples.shape
    planes = [samples[..., i : i + 1] for i in range(count)] if planar else [samples]
    rows = rows or height
    pieces = []
    for plane in planes:
        if tile is None:
            pieces += [plane[top : top + rows] for top in range(0, height, rows)]
            continue
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                part = np.zeros((tile, tile, plane.shape[2]), plane.dtype)
                cut = plane[top : top + tile, left : left + tile]
                part[: cut.shape[0], : cut.shape[1]] = cut
                pieces.append(part)
    stored = [_packed(piece, bits, order, kind, predictor) for piece in pieces]
    stored = [zlib.compress(piece) if deflate else piece for piece in stored]
    stored = [bytes(int(f"{byte:08b}"[::-1], 2) for byte in piece) if reverse else piece for piece in stored]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [8 if deflate else 1]),
        262: (3, [photometric]),
        266: (3, [2 if reverse else 1]), 277: (3, [count]), 284: (3, [2 if planar else 1]), 317: (3, [predictor]),
        339: (3, [kind] * count),
    }  # fmt: skip
    offsets, place = [], 8
    for piece in stored:
        offsets.append(place)
        place += len(piece) + len(piece) % 2
    counts = [len(piece) for piece in stored]
    if tile is None:
        tags |= {273: (4, offsets), 278: (4, [rows]), 279: (4, counts)}
    else:
        tags |= {322: (4, [tile]), 323: (4, [tile]), 324: (4, offsets), 325: (4, counts)}
    tags |= {int(name[1:]): value for name, value in more.items()}
    data = b"".join(piece + b"\0" * (len(piece) % 2) for piece in stored)
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(f"{order}I", 8 + len(data))
        + data
        + _directory(tags, order, place)
    )


def _packed(piece: np.ndarray, bits: int, order: str, kind: int, predictor: int) -> bytes:
    if kind == 3:
        values = piece.astype(f"{order}f{bits // 8}")
        if predictor == 3:
            rows, width, count = piece.shape
            big = np.ascontiguousarray(piece.astype(f">f{bits // 8}")).reshape(rows, -1).view(np.uint8)
            planes = np.ascontiguousarray(big.reshape(rows, width * count, bits // 8).swapaxes(1, 2)).reshape(
                rows, -1, count
            )
            return np.diff(planes, axis=1, prepend=np.zeros_like(planes[:, :1])).tobytes()
        return values.tobytes()
    if predictor == 2:
        piece = piece.astype(f"u{bits // 8}")
        piece = np.diff(piece, axis=1, prepend=np.zeros_like(piece[:, :1]))
    if bits in (8, 16, 32):
        return (piece.astype(np.int64) % (1 << bits)).astype(f"{order}u{bits // 8}").tobytes()
    rows = []
    for row in piece.reshape(len(piece), -1):
        text = "".join(f"{level:0{bits}b}" for level in row)
        text += "0" * (-len(text) % 8)
        rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
    return b"".join(rows)


def _directory(tags: dict[int, tuple[int, list[int]]], order: str, place: int) -> bytes:
    sizes = {1: "B", 3: "H", 4: "I"}
    entries, behind = b"", b""
    after = place + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        packed = b"".join(struct.pack(order + sizes[kind], value) for value in values)
        if len(packed) > 4:
            value = struct.pack(f"{order}I", after + len(behind))
            behind += packed + b"\0" * (len(packed) % 2)
        else:
            value = packed.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + value
    return struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + behind
