"""coremltools, imported when it is needed: without what it would import only to look at, and without what it prints."""

import contextlib
import importlib
import logging
import platform
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import OptionError
from .silence import silence

# Libraries that coremltools converts from, imported where they are installed: seconds and hundreds of megabytes for
# nothing.
UNUSED = ("torch", "torchvision", "torchaudio", "torchao", "tensorflow", "sklearn", "xgboost", "executorch")
MISSING = "Writing for Core ML takes the extra 'coreml': pip install 'fastvlm-mlx[coreml]'"


def load() -> Any:
    """The module coremltools; raises OptionError, saying what to do, where it is not installed or does not work
    here."""
    try:
        with quiet():
            module = importlib.import_module("coremltools")
            importlib.import_module("coremltools.converters.mil")
        return module
    except ImportError as error:
        raise OptionError(f"{MISSING} ({_where(error)}).") from error


def _where(error: ImportError) -> str:
    """Why the import failed, as far as it can be told."""
    machine, version = platform.machine(), platform.python_version()
    if isinstance(error, ModuleNotFoundError) and error.name == "coremltools":
        if sys.version_info >= (3, 14):
            return f"coremltools has no build for Python {version} yet; use Python 3.11 to 3.13"
        if sys.platform == "linux" and machine not in ("x86_64", "AMD64"):
            return f"coremltools has no build for Linux on {machine}; run this on a Mac, or on x86-64"
        return "it is not installed"
    return f"it is installed and cannot be imported: {error}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, coremltools finds none of the libraries it does not need here, and what it prints goes
    nowhere."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    logger = logging.getLogger("coremltools")
    level = logger.level
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: as if it were not installed
    logger.setLevel(logging.CRITICAL)
    try:
        with silence():
            yield
    finally:
        logger.setLevel(level)
        for name in hidden:
            if sys.modules.get(name, 0) is None:
                del sys.modules[name]
