"""The installation: MLX's versions and wheels, its settings in the environment, and the library for products."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

from ...backend import blas
from ...version import __version__
from ..machine import MEASURED
from .finding import Finding, holds
from .machine import chip
from .setting import Setting

PARTS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # the wheels that hold a backend
# The first release known to raise an error, where memory runs out on Metal, instead of ending the process.
FIRST = (0, 32, 3)
NEW_CHIP, NEW_SYSTEM, NEW_WHEEL = (
    "Apple M5",
    (26, 2),
    "macosx_26",
)  # matrix kernels for that chip are in that wheel only
SETTINGS = "MLX_"  # beginning of the environment variables that MLX reads
HARMLESS = {"MLX_ENABLE_TF32"}  # set by doctor itself


def check(setting: Setting) -> Iterator[Finding]:
    """Findings about versions, wheels, settings and BLAS."""
    found = {"fastvlm-mlx": __version__, "python": platform.python_version()}
    found |= {name: number for name in (*MEASURED, *PARTS) if (number := number_of(name))}
    yield Finding(
        "versions", "measured", ", ".join(f"{name} {number}" for name, number in found.items()), "", details=found
    )
    yield mlx_version(found.get("mlx", "0"))
    yield wheel()
    named = sorted(name for name in os.environ if name.startswith(SETTINGS) and name not in HARMLESS)
    shown = ", ".join(f"{name}={os.environ[name]}" for name in named) or "none"
    yield holds(
        "MLX's settings in the environment",
        not named,
        shown,
        "none, or figures are not the usual ones",
        otherwise="note",
    )
    yield holds(
        "matrix products on the CPU", not blas.is_slow(), blas.status(), "not the reference BLAS", otherwise="note"
    )


def number_of(name: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def mlx_version(number: str) -> Finding:
    """Whether MLX survives running out of memory; earlier releases ended the process on Metal."""
    parts = tuple(int(part) for part in number.split(".")[:3] if part.isdigit())
    expects = f"{'.'.join(map(str, FIRST))} or later: earlier ones may end the process where memory runs out"
    return holds("mlx", parts >= FIRST, number, expects)


def wheel(*, system: str | None = None, name: str | None = None, tags: list[str] | None = None) -> Finding:
    """Whether the wheel of MLX's Metal backend has the kernels for this chip and macOS.

    The arguments stand in for this machine's values, for tests.
    """
    system = platform.mac_ver()[0] if system is None else system
    name = chip() if name is None else name
    tags = wheel_tags() if tags is None else tags
    version = tuple(int(part) for part in system.split(".")[:2] if part.isdigit())
    needed = name.startswith(NEW_CHIP) and version >= NEW_SYSTEM
    right = not needed or any(NEW_WHEEL in tag for tag in tags)
    expects = f"{NEW_WHEEL} on an M5 with macOS 26.2 or later; uninstall mlx-metal and install it again"
    return holds("MLX's wheel", right, ", ".join(tags) or "none with a tag", expects)


def wheel_tags() -> list[str]:
    """The tags of the installed wheels that hold MLX's backends."""
    found = []
    for name in PARTS:
        try:
            lines = (distribution(name).read_text("WHEEL") or "").splitlines()
        except PackageNotFoundError:
            continue
        found += [f"{name} {line.partition(':')[2].strip()}" for line in lines if line.startswith("Tag:")]
    return found if found or sys.platform == "darwin" else []
