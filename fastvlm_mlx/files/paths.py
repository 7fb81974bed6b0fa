"""A path as people have it -> the path of the file on this disk.

Enters: what was typed, dragged or copied: with ~ or file://, or with another kind of space or another Unicode form than
the name on the disk has. macOS names screenshots with U+202F before AM and PM, and decomposes letters that keyboards
compose. Leaves: a path to open; and which names in a folder are companions of other files instead of files of their
own.
"""

import os
import re
import unicodedata

from ..errors import OptionError, shown

FILE_ADDRESS = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))", re.IGNORECASE)  # one of this machine
MAX_PATH_CHARS = 4096  # of a path that is looked for in other spellings
COMPANION = "._"  # how the name begins that macOS gives a file's attributes where the disk (exFAT, a network's) cannot hold them


def local(path: str | os.PathLike[str]) -> str:
    """A path with its ~ and file:// resolved; whatever else it is stays."""
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise OptionError(f"`path` is {shown(path)}, expected the path of a file.") from error
    if (address := FILE_ADDRESS.match(text)) is not None:
        from urllib.parse import unquote_to_bytes

        return os.fsdecode(unquote_to_bytes(text[address.end() :]))
    return os.path.expanduser(text)  # noqa: PTH111  (leaves what it cannot expand as it is)


def find(path: str | os.PathLike[str]) -> str:
    """The path, resolved as by `local`, in the spelling of the disk.

    Where nothing has that name, but one name differs from it in the kind of its spaces or in its Unicode form only,
    that is the path; where several do, or none, it is returned as it is.
    """
    wanted = local(path)
    if os.path.lexists(wanted) or len(wanted) > MAX_PATH_CHARS:
        return wanted
    there, missing = wanted, []
    while there and not os.path.lexists(there):
        parent, name = os.path.split(there)
        if parent == there:
            return wanted
        there = parent
        if name:
            missing.append(name)
    for name in reversed(missing):
        try:
            alike = [entry for entry in os.listdir(there or ".") if _key(entry) == _key(name)]  # noqa: PTH208  (names are enough)
        except (OSError, ValueError):
            return wanted
        if len(alike) != 1:
            return wanted
        there = os.path.join(there, alike[0])  # noqa: PTH118  (keeps a relative path's beginning)
    return there


def is_companion(name: str) -> bool:
    """Whether a file of this name holds another file's attributes ("._photo.jpg") and nothing of its own."""
    return name.startswith(COMPANION)


def _key(name: str) -> str:
    """A name with every space a plain one and every letter composed."""
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in unicodedata.normalize("NFC", name))
