"""The picture on the clipboard: files copied in Finder, or the picture itself."""

import subprocess
import sys

from ...errors import ImageError
from ...inputs.image import Source

# A copied file leaves its icon on the clipboard as well, so its path is asked for first. Pillow asks for pictures only.
OSASCRIPT = ("/usr/bin/osascript", "-e", "POSIX path of (the clipboard as «class furl»)")
MAX_SECONDS = 10.0  # until macOS answers


def pictures() -> list[Source]:
    """The paths of copied files, or the copied picture.

    Raises ImageError where there is none, or no tool to ask with.
    """
    if sys.platform == "darwin" and (path := _copied_file()) is not None:
        return [path]
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (
        NotImplementedError,
        OSError,
        ValueError,
    ) as error:  # without wl-paste or xclip, or with something else on it
        raise ImageError(
            f"The clipboard cannot be read ({error or 'no tool for it'}); save the picture and use /image."
        ) from error
    if found is None or found == []:
        raise ImageError("There is no picture on the clipboard; copy one, or use /image PATH.")
    return list(found) if isinstance(found, list) else [found]


def _copied_file() -> str | None:
    """The path of the first file copied in Finder; None where something else, or nothing, is on the clipboard."""
    try:
        told = subprocess.run(
            OSASCRIPT, stdin=subprocess.DEVNULL, capture_output=True, timeout=MAX_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.decode("utf-8", "surrogateescape").removesuffix("\n") or None
