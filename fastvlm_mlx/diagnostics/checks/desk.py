"""What surrounds the command: pictures as a phone takes them (HEIC), the clipboard, the terminal."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import FastVLMError
from ...inputs.image import load_image
from .finding import Finding, at_most, holds
from .setting import Setting

SIPS = "/usr/bin/sips"  # macOS's own converter of pictures
OSASCRIPT = "/usr/bin/osascript"  # macOS's tool that reads the clipboard
COLOUR = (200, 60, 30)
MAX_LEVELS_OFF = 16.0  # levels of 255 that a lossy picture of one colour may be off: four bits of eight
TOOL_SECONDS = 20.0  # seconds for a tool of the system


def check(setting: Setting) -> Iterator[Finding]:
    """Findings about HEIC pictures, the clipboard and the terminal."""
    yield heic()
    yield clipboard()
    yield terminal()


def heic() -> Finding:
    """Whether a HEIC picture can be read; wrong on a Mac where not, as its cameras take no others."""
    data = made_heic()
    if data is None:
        found = "nothing here makes a HEIC picture, so none was tried"
        return Finding(
            "HEIC",
            "wrong" if sys.platform == "darwin" else "note",
            found,
            "a picture that can be read: pip install pillow-heif",
        )
    try:
        pixels = np.asarray(load_image(data).convert("RGB"))
    except FastVLMError as error:
        return Finding("HEIC", "wrong", str(error), "a picture that can be read")
    off = float(np.abs(pixels.astype(float).mean(axis=(0, 1)) - COLOUR).max())
    return at_most(
        "HEIC",
        off,
        MAX_LEVELS_OFF,
        found=f"read, {off:.1f} levels off",
        expected=f"at most {MAX_LEVELS_OFF:.0f} levels of 255",
        unit="levels",
    )


def made_heic() -> bytes | None:
    """A HEIC picture of one colour, made by a tool of the system or a library; None where there is neither."""
    picture = Image.new("RGB", (64, 64), COLOUR)
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return _by_sips(picture) if Path(SIPS).is_file() else None
    file = BytesIO()
    pillow_heif.from_pillow(picture).save(file, format="HEIF", quality=90)
    return file.getvalue()


def _by_sips(picture: Image.Image) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        png, made = Path(folder) / "picture.png", Path(folder) / "picture.heic"
        picture.save(png)
        command = [SIPS, "-s", "format", "heic", str(png), "-o", str(made)]
        subprocess.run(command, capture_output=True, timeout=TOOL_SECONDS, check=False)
        return made.read_bytes() if made.is_file() else None


def clipboard() -> Finding:
    """Whether there is a way to the clipboard; its content is not read."""
    if sys.platform == "darwin":
        remote = "SSH_CONNECTION" in os.environ  # then there may be no desktop to ask
        try:
            done = subprocess.run(
                [OSASCRIPT, "-e", "count of (clipboard info)"],
                capture_output=True,
                text=True,
                timeout=TOOL_SECONDS,
                check=False,
            )
            said, right = "osascript" if not done.returncode else done.stderr, not done.returncode
        except subprocess.TimeoutExpired:
            said, right = f"no answer in {TOOL_SECONDS:.0f} s", False
        return holds("clipboard", right, said, "osascript answers", otherwise="note" if remote else "wrong")
    tools = [tool for tool in ("wl-paste", "xclip") if shutil.which(tool)]
    if not any(os.environ.get(name) for name in ("WAYLAND_DISPLAY", "DISPLAY")):
        return Finding("clipboard", "measured", "no desktop here", "")
    return holds("clipboard", bool(tools), ", ".join(tools) or "no tool for it", "wl-paste or xclip", otherwise="note")


def terminal() -> Finding:
    """Where answers are printed: the terminal's name, and whether it takes any character."""
    encoding = (getattr(sys.stdout, "encoding", None) or "unknown").lower()
    at = "a terminal" if sys.stdout is not None and sys.stdout.isatty() else "no terminal"
    names = [os.environ[name] for name in ("TERM_PROGRAM", "TERM", "COLORTERM") if os.environ.get(name)]
    found = ", ".join([at, encoding, *names])
    return holds(
        "terminal", encoding.replace("-", "") == "utf8", found, "UTF-8, or characters are lost", otherwise="note"
    )
