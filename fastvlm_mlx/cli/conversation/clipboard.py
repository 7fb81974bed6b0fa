"""The picture on the clipboard, where there is one."""

from ...errors import ImageError
from ...inputs.image import Source


def pictures() -> list[Source]:
    """A picture that was copied, or the files that were; raises ImageError where there are none, or no way to ask."""
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError, ValueError) as error:  # Linux without wl-paste or xclip, or with something else on it
        raise ImageError(f"The clipboard cannot be read ({error or 'no tool for it'}); save the picture and use /image.") from error
    if found is None or found == []:
        raise ImageError("There is no picture on the clipboard; copy one, or use /image PATH.")
    return list(found) if isinstance(found, list) else [found]
