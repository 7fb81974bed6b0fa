"""A path as a person has it -> the path of the file on this disk.

Enters: a path as typed, dragged or copied. It may begin with ~ or file://, and its spaces and accented letters may be
encoded differently from the name on the disk: macOS writes U+202F before AM and PM in the names of screenshots, and
decomposes letters that keyboards compose.
Leaves: a path that can be opened; and which files of a folder only hold another file's attributes.
"""

import os
import re
import unicodedata

from ..errors import OptionError, shown

FILE_ADDRESS = re.compile(
    r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))", re.IGNORECASE
)  # the address of a file on this machine
MAX_PATH_CHARS = 4096  # characters of a path that is searched in other spellings
# macOS keeps a file's attributes in a file whose name begins so, on disks (exFAT, a network's) that cannot hold them.
COMPANION = "._"


def local(path: str | os.PathLike[str]) -> str:
    """Resolve ~ and file:// at the beginning of a path; any other path is returned as it is.

    Raises OptionError for something that is not a path.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise OptionError(f"`path` is {shown(path)}, expected the path of a file.") from error
    if (address := FILE_ADDRESS.match(text)) is not None:
        from urllib.parse import unquote_to_bytes

        return os.fsdecode(unquote_to_bytes(text[address.end() :]))
    return os.path.expanduser(text)  # noqa: PTH111  (leaves what it cannot expand as it is)


def find(path: str | os.PathLike[str]) -> str:
    """Resolve a path as `local` does, and correct it to the spelling on the disk.

    Where no file has this name but exactly one differs from it only in the kind of its spaces or in its Unicode
    normalisation, that file's path is returned; otherwise the path is returned unchanged, whether or not it exists.
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
    """Whether a file of this name ("._photo.jpg") only holds attributes of another file, as macOS writes them."""
    return name.startswith(COMPANION)


def _key(name: str) -> str:
    """A name with every kind of space made a plain one and its letters composed (NFC), for comparing spellings."""
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in unicodedata.normalize("NFC", name))
