"""Pictures in order, in every format that is read, and what is wrong with hostile ones: made from a seed, as bytes."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, features

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))


def pixels(width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    ramp = np.stack(np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height)), -1)
    blue = np.full((height, width, 1), 90.0)
    return (np.concatenate([ramp, blue], -1) + rng.integers(0, 40, (height, width, 3))).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A file in memory."""
    file = BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def sample(kind: str) -> bytes:
    """A small picture in order."""
    image = Image.fromarray(pixels())
    return encoded(image.convert("P") if kind == "GIF" else image, kind)


def animation(kind: str) -> bytes:
    """Red, then blue."""
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    options: dict[str, Any] = {"save_all": True, "append_images": [blue]}
    if kind in ("GIF", "PNG", "WEBP", "AVIF"):
        options["duration"] = 100
    return encoded(red, kind, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A PNG of chosen header, chunks and (by default black) content."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if data is None:
        data = zlib.compress(bytes(min((1 + -(-width * bits // 8)) * height, 1 << 20)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that promise or unfold to far more than they are."""
    text = zlib.compress(bytes(50_000_000), 1)
    bitmap = bytearray(sample("BMP"))
    bitmap[18:26] = struct.pack("<ii", 60_000, 60_000)
    jpeg = bytearray(sample("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(sample("GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    webp = bytearray(
        encoded(
            Image.new("RGBA", (16, 16)),
            "WEBP",
            lossless=True,
            save_all=True,
            append_images=[Image.new("RGB", (16, 16))],
        )
    )
    webp[24:30] = b"\xff\x3f\x00\xff\x3f\x00"  # VP8X's canvas
    return {
        "PNG of 100000 x 100000": png(100_000, 100_000),
        "PNG of 2 ** 31 - 1": png((1 << 31) - 1, (1 << 31) - 1, data=b"x"),
        "PNG of 20000 x 20000 at one bit": png(20_000, 20_000, depth=1),
        "PNG with a zTXt bomb": png(8, 8, chunk(b"zTXt", b"Comment\0\0" + text)),
        "PNG with an iTXt bomb": png(8, 8, chunk(b"iTXt", b"Comment\0\1\0\0\0" + text)),
        "PNG with an ICC bomb": png(8, 8, chunk(b"iCCP", b"icc\0\0" + text)),
        "PNG with 80 texts of a megabyte": png(
            8, 8, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 1))] * 80
        ),
        "PNG with five million chunks": png(8, 8, *[chunk(b"tEXt", b"k\0v")] * 5_000_000),
        "PNG with a line of 100000": png(100_000, 1),
        "PNG with a column of 100000": png(1, 100_000, data=zlib.compress(bytes(200_000))),
        "BMP of 60000 x 60000": bytes(bitmap),
        "JPEG of 65500 x 65500": bytes(jpeg),
        "GIF of 65535 x 65535": bytes(gif),
        "WebP of 16384 x 16384": bytes(webp),
        "TIFF of 60000 x 60000": tiff(60_000, 60_000),
        "TIFF of 4294967295 x 4294967295": tiff((1 << 32) - 1, (1 << 32) - 1),
    }


def tiff(
    width: int, height: int, *, bits: int = 8, kind: int = 1, data: bytes = bytes(64), following: int = 0
) -> bytes:
    """A grey TIFF of chosen size and depth, uncompressed."""
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, kind),
    ]
    directory = (
        struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + struct.pack("<I", following)
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


FOREIGN: dict[str, tuple[bytes, str]] = {
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG"),
    "SVG after XML": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg/>', "SVG"),
    "SVG with external entities": (
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        "SVG",
    ),
    "CRW": (b"II\x1a\0\0\0HEAPCCDR" + bytes(100), "raw picture"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS"),
    "PSD": (b"8BPS\0\1" + bytes(100), "Photoshop"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file\n", "EPS"),
    "EPS of Windows": (b"\xc5\xd0\xd3\xc6" + bytes(60), "EPS"),
    "FITS": (b"SIMPLE  =                    T" + b" " * 2850, "FITS"),
    "PDF": (b"%PDF-1.7\n1 0 obj\n", "PDF"),
    "JPEG XL": (b"\xff\x0a" + bytes(60), "JPEG XL"),
    "JPEG XL in a box": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "JPEG XL"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60), "JPEG 2000"),
    "ICO": (b"\0\0\1\0\1\0" + bytes(60), "icon"),
    "HDR": (b"#?RADIANCE\n", "high-dynamic-range"),
    "EXR": (b"v/1\x01" + bytes(60), "high-dynamic-range"),
    "MP4": (b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(60), "video"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(60), "video"),
    "AVI": (b"RIFF\x10\0\0\0AVI LIST" + bytes(60), "video"),
    "ZIP": (b"PK\x03\x04" + bytes(60), "archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "archive"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "text": (b"This is not a picture.\n", "no image"),
    "noise": (np.random.default_rng(3).bytes(5000), "no image"),
    "zeros": (bytes(5000), "no image"),
    "one byte": (b"\xff", "no image"),
    "a signature alone": (b"\x89PNG\r\n\x1a\n", "photo"),
    "pickle": (b"\x80\x04cos\nsystem\n(S'touch /tmp/executed'\ntR.", "no image"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "no image"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "photo"),
    "HEIC by its second brand": (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heix" + bytes(100), "photo"),
    "AVIF cut short": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(10), "photo"),
}
