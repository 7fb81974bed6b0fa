"""Image files that are damaged outside their pixels -> the pixels.

Enters: the bytes of a JPEG or a PNG. Leaves: bytes that Pillow decodes, or an image; None where the pixels themselves
may be damaged. Sources: ITU-T T.81 (JPEG), annex B; PNG specification, third edition, 5 and 11.3.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
END_MARKER = b"\xff\xd9"
PADDING_BYTES = 64  # bytes; more than one block of a JPEG takes
DECODED_CHUNKS = (b"tRNS", b"sBIT", b"eXIf")  # ancillary chunks that change what the pixels mean
VISIBLE_CHUNKS = (b"tRNS",)  # ancillary chunks without which the picture looks different


def with_end_markers(data: bytes) -> tuple[bytes, bytes] | None:
    """A JPEG that lacks its end marker, completed in two ways with different bytes before it; None for other files.

    Where both decode to the same pixels, no pixel depends on missing bytes.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    body = data.rstrip(b"\0")  # zeros fill a file whose end was not written
    if body.endswith(b"\xff\xff"):  # fill bytes, any number of which may stand before a marker (B.1.1.2)
        body = body.rstrip(b"\xff")
    if body.endswith(b"\xff"):
        body = body + b"\0" if len(body) < len(data) else body[:-1]  # a byte of the picture, or half an end marker
    first, second = (body + filling * PADDING_BYTES + END_MARKER for filling in (b"\x55", b"\xaa"))
    return first, second


def without_damaged_chunks(data: bytes) -> tuple[bytes, list[str]] | None:
    """A PNG without the chunks whose checksum is wrong, and the names of these; None where there are none.

    Only chunks that do not change the picture (text, times, profiles) are removed: None, too, where another one is
    damaged.
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
    """A PNG reduced to the chunks that its pixels are decoded from.

    None for another file, or where one of these chunks is damaged.
    """
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
    """Whether it is a PNG with an sBIT chunk, which says how many bits of a level are significant."""
    return data.startswith(PNG) and any(name == b"sBIT" and sound for name, _, sound in _chunks(data))


def unaligned(image: Image.Image, data: bytes) -> Image.Image:
    """A 16-bit grey PNG's image with its levels brought to the full range, where the file stores them at the wrong end.

    sBIT says how many bits are significant; the specification has them at the top of a level. A file whose levels all
    fit into the declared number of bits, and do not follow that rule, has them at the bottom.
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
    """(name, content, whether the checksum is right) of each chunk of a PNG, up to its end."""
    place = len(PNG)
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        name, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        sound = data[place + 8 + size : place + 12 + size] == _checksum(name, content)
        yield name, content, sound
        if name == b"IEND":
            return
        place += 12 + size
