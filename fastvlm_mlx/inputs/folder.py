"""What stands for pictures (a path, a folder of them, a pattern such as photos/*.jpg) -> their paths, in order."""

import glob
import os

from ..errors import ImageError, shown
from ..files import paths

# What a picture's name ends in: in a folder, all others are passed over.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".hif",
)  # fmt: skip


def pictures(path: str) -> list[str]:
    """The paths that a path stands for: a folder's pictures and a pattern's files by name, any other path itself.

    Hidden files, and with them the companions that macOS makes ("._photo.jpg"), are passed over. Raises ImageError for
    a folder without pictures, or one that cannot be read.
    """
    found = paths.find(path)
    if os.path.isdir(found):  # noqa: PTH112  (false, too, for impossible names)
        return in_folder(found)
    if not os.path.lexists(found) and glob.has_magic(found):
        return sorted(match for match in glob.glob(found) if os.path.isfile(match)) or [path]  # noqa: PTH207, PTH113
    return [path]


def in_folder(folder: str) -> list[str]:
    """The pictures that lie in a folder, by name; raises ImageError where there are none."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208  (names are enough)
    except OSError as error:
        raise ImageError(
            f"{shown(folder)}: the folder cannot be read ({error.strerror}); check its permissions.",
            path=folder,
        ) from error
    found = [os.path.join(folder, name) for name in names if is_picture(name)]  # noqa: PTH118
    found = [path for path in found if os.path.isfile(path)]  # noqa: PTH113
    if not found:
        raise ImageError(
            f"{shown(folder)} is a folder, and there are no pictures in it; name a picture, or a folder of pictures.",
            path=folder,
        )
    return found


def is_picture(name: str) -> bool:
    """Whether a file of this name is a picture of a folder: by what it ends in, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)
