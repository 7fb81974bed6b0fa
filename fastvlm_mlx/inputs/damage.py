"""Files that are damaged, or mistaken, beside their pixels -> what is needed to use the pixels all the same.

Enters: the bytes of a JPEG or a PNG. Leaves: bytes that Pillow decodes, or an image; None where the pixels themselves
may be affected. Source: ITU-T T.81 (JPEG), annex B; PNG specification, third edition, 5 and 11.3.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
END_MARKER = b"\xff\xd9"
PADDING_BYTES = 64  # bytes, more than a block of a picture takes
DECODED_CHUNKS = (b"tRNS", b"sBIT", b"eXIf")  # chunks that are not critical, and say how the pixels are meant
VISIBLE_CHUNKS = (b"tRNS",)  # chunks a picture can be decoded without, and would not look the same


def with_end_markers(data: bytes) -> tuple[bytes, bytes] | None:
    """A JPEG ended in two ways, with other bytes before the end marker; None for what is no JPEG.

    Where both decode to the same pixels, none of these depended on bytes that are missing.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    body = data.rstrip(b"\0")  # what fills the rest of a file whose end was not written
    if body.endswith(b"\xff\xff"):  # a filling too, of which any length may stand before a marker (B.1.1.2)
        body = body.rstrip(b"\xff")
    if body.endswith(b"\xff"):
        body = body + b"\0" if len(body) < len(data) else body[:-1]  # a byte of the picture, or half an end marker
    first, second = (body + filling * PADDING_BYTES + END_MARKER for filling in (b"\x55", b"\xaa"))
    return first, second


def without_damaged_chunks(data: bytes) -> tuple[bytes, list[str]] | None:
    """A PNG without the chunks (text, times, profiles) whose checksum is wrong, and their names; None where there are none.

    None as well where a chunk that shows in the picture is among them.
    """
    if not data.startswith(PNG):
        return None
    kept, removed = [PNG], []
    for name, content, sound in _chunks(data):
        if not sound and (name[:1].isupper() or name in VISIBLE_CHUNKS):
            return None
        if sound:
            kept.append(_chunk(name, content))
        else:
            removed.append(name.decode("latin-1"))
    return (b"".join(kept), removed) if removed else None


def without_extras(data: bytes) -> bytes | None:
    """A PNG of the chunks that its pixels are decoded from, and no others; None where one of these is damaged, or it is no PNG."""
    if not data.startswith(PNG):
        return None
    kept = [PNG]
    for name, content, sound in _chunks(data):
        if name[:1].isupper() or name in DECODED_CHUNKS:
            if not sound:
                return None
            kept.append(_chunk(name, content))
    return b"".join(kept)


def declares_bits(data: bytes) -> bool:
    """Whether it is a PNG that says how many bits of its levels mean something."""
    return data.startswith(PNG) and any(name == b"sBIT" and sound for name, _, sound in _chunks(data))


def unaligned(image: Image.Image, data: bytes) -> Image.Image:
    """A 16-bit grey PNG's image with its levels at full range, where they are right-aligned against the specification.

    sBIT says how many bits mean something, and a level's other bits are a filling that follows from these. A file in
    which they are not, while no level has more than the declared bits, holds these bits at the wrong end.
    """
    bits = next(
        (content[0] for name, content, sound in _chunks(data) if name == b"sBIT" and sound and len(content) == 1), 16
    )
    if not 1 <= bits < 16:
        return image
    levels, greatest = np.asarray(image).astype(np.uint32), (1 << bits) - 1
    if levels.max() > greatest:
        return image
    meant = levels >> (16 - bits)
    zeros, scaled = meant << (16 - bits), (meant * 65535 + greatest // 2) // greatest
    if ((levels == zeros) | (np.abs(levels.astype(np.int64) - scaled) <= 1)).all():
        return image
    out = Image.fromarray(((levels * 65535 + greatest // 2) // greatest).astype(np.uint16))
    out.info = dict(image.info)  # the orientation among it
    if isinstance(transparent := image.info.get("transparency"), int):
        out.info["transparency"] = (transparent * 65535 + greatest // 2) // greatest
    return out


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + _checksum(name, content)


def _checksum(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """(name, content, whether its checksum is right) of each chunk of a PNG, up to its end."""
    place = len(PNG)
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        name, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        sound = data[place + 8 + size : place + 12 + size] == _checksum(name, content)
        yield name, content, sound
        if name == b"IEND":
            return
        place += 12 + size
