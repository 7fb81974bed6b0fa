"""Folders of many small pictures, each unlike the others, and files that look like pictures and are none."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .pictures import bombs, encoded, sample

COLOURS = ("red", "green", "blue", "yellow", "orange", "black")


def drawing(number: int, size: int = 96) -> Image.Image:
    """One to four shapes on white, drawn from a seed."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(1 + int(rng.integers(4))):
        x, y, radius = (int(each) for each in rng.integers((10, 10, 6), (size - 10, size - 10, 20)))
        box = (x - radius, y - radius, x + radius, y + radius)
        fill = COLOURS[int(rng.integers(len(COLOURS)))]
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=fill)
    return image


def album(folder: Path, count: int) -> list[Path]:
    """Write so many drawings, as JPEG and PNG in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(count):
        path = folder / f"{number:05d}.{'png' if number % 2 else 'jpg'}"
        drawing(number).save(path)
        found.append(path)
    return found


def damages() -> list[bytes]:
    """Files that cannot be used, each damaged in a way of its own."""
    jpeg, png, webp = (sample(kind) for kind in ("JPEG", "PNG", "WEBP"))
    rng = np.random.default_rng(0)
    found = [
        b"", b"\0" * 1000, b"<html><body>404 Not Found</body></html>", b"no picture", rng.bytes(500), jpeg[:2], png[:8],
        webp[:20], b"%PDF-1.7\n", b"\x1f\x8b\x08" + rng.bytes(200), png[:16] + b"\0" * 8 + png[24:],
        b"\x89PNG\r\n\x1a\n" + rng.bytes(300), b"\xff\xd8\xff" + rng.bytes(300), b"GIF89a" + rng.bytes(10),
        *bombs().values(),
    ]  # fmt: skip
    for kind in ("PNG", "WEBP", "TIFF", "BMP", "JPEG"):
        data = encoded(drawing(7), kind)
        found += [data[: len(data) * share // 100] for share in (5, 10, 20, 30, 40)]
    return found
