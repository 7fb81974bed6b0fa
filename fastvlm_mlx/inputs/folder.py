"""A path, a folder of pictures, or a pattern such as photos/*.jpg -> the paths of the pictures, in order."""

import glob
import os

from ..errors import ImageError, shown
from ..files import paths

# What a picture's name ends in: in a folder, all others are passed over.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".hif",
)  # fmt: skip


def pictures(path: str) -> list[str]:
    """The paths that a path stands for: a folder's pictures, the files that match a pattern, or else the path itself.

    Both are sorted by name. Hidden files are left out, and with them the ones that macOS makes ("._photo.jpg"). Raises
    ImageError for a folder that has no pictures or cannot be read.
    """
    found = paths.find(path)
    if os.path.isdir(found):  # noqa: PTH112  (false, too, for impossible names)
        return in_folder(found)
    if not os.path.lexists(found) and glob.has_magic(found):
        return sorted(match for match in glob.glob(found) if os.path.isfile(match)) or [path]  # noqa: PTH207, PTH113
    return [path]


def in_folder(folder: str) -> list[str]:
    """The paths of a folder's pictures, sorted by name; raises ImageError where there are none."""
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
    """Whether a file of this name counts as a picture in a folder: it is not hidden and ends in one of SUFFIXES."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)
