"""Every error and warning that this package raises on purpose.

    FastVLMError
    ├── ImageError        a picture cannot be opened or used
    ├── PromptError       a text, or a text with its pictures, cannot be given to the model
    ├── OptionError       an argument is outside its range
    ├── BusyError         a conversation is used while another thread reads an answer of it
    ├── CancelledError    an answer was ended before it was finished
    ├── CheckpointError   a model folder has files that are missing, damaged or of an unknown layout
    │   └── TokenizerError
    ├── HubError          a name cannot be resolved to a folder
    ├── OutputError       a result cannot be written
    ├── TrainingError     fine-tuning cannot go on: the loss is no number, or a process is gone
    └── DeviceError       the device that computes failed, or cannot be used from this process
        └── OutOfMemoryError   the memory ran out; it is a MemoryError as well

    FastVLMWarning        an input was used, but there is something about it to know

A message is one sentence or two: what was found, what was expected, what to do. Arguments stand in backquotes, as
Python names them (`max_tokens`, `dtype='bfloat16'`); the command line puts its flags in their place. A program need not
read the message: `path` is the file or folder that an error is about, and `option` the argument.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


class FastVLMError(Exception):
    """Base of every error that this package raises on purpose; the command line prints its message and exits with 1.

    `path` is the file or folder that the error is about, and `option` the argument; each is None where there is none.
    """

    def __init__(self, *args: object, path: str | os.PathLike[str] | None = None):
        super().__init__(*args)
        self.path = None if path is None else Path(path)

    @property
    def option(self) -> str | None:
        """The argument that the message names first, as Python spells it ("max_tokens"); None where it names none."""
        name = str(self).partition("`")[2].partition("`")[0].partition("=")[0]
        return name if name.isidentifier() else None


class ImageError(FastVLMError):
    """A picture cannot be opened or used."""


class PromptError(FastVLMError):
    """A text, or a text together with its pictures, cannot be given to the model."""


class OptionError(FastVLMError):
    """An argument is outside its range."""


class BusyError(FastVLMError):
    """A conversation was used while another thread is still reading an answer of it."""


class CancelledError(FastVLMError):
    """An answer that was broken off before it was finished."""


class CheckpointError(FastVLMError):
    """A model folder has files that are missing, damaged or of an unknown layout."""


class TokenizerError(CheckpointError):
    """Tokenizer files are missing, damaged or do not fit the model."""


class HubError(FastVLMError):
    """A model's name could not be resolved to a folder, or the folder could not be downloaded or published."""


class OutputError(FastVLMError):
    """A result could not be written."""


class TrainingError(FastVLMError):
    """Fine-tuning that cannot go on: the loss is no number, or another process has ended or hangs."""


class DeviceError(FastVLMError):
    """The device that computes failed, or cannot be used from this process.

    Results of a failed computation are dropped.
    """


class OutOfMemoryError(DeviceError, MemoryError):
    """The memory of the device or of the machine ran out. It is a MemoryError as well."""


class FastVLMWarning(UserWarning):
    """An input was used, but there is something about it to know."""


@contextmanager
def about(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """A context manager: every FastVLMError raised in the block gets this `path` unless it has one.

    None changes nothing.
    """
    try:
        yield
    except FastVLMError as error:
        if error.path is None and path is not None:
            error.path = Path(path)
        raise


def about_its_path(function: Callable[Concatenate[Path, P], Result]) -> Callable[Concatenate[Path, P], Result]:
    """Decorate a function whose first argument is a path: its FastVLMErrors get this path, unless they have one."""

    @wraps(function)
    def called(path: Path, /, *args: P.args, **keywords: P.kwargs) -> Result:
        with about(path):
            return function(path, *args, **keywords)

    return called


def warn(message: str) -> None:
    """Warn (FastVLMWarning); the warning points at the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FastVLMWarning, stacklevel=level)


INSIDE = ("fastvlm_mlx", "contextlib", "functools")  # packages whose frames are skipped
MAX_LISTED_NAMES = 5
MAX_SHOWN_CHARS = 200  # characters of a name or a value


def shown(value: object) -> str:
    """The repr of a value from outside, for a message; cut after MAX_SHOWN_CHARS characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def listed(names: Iterable[object]) -> str:
    """Up to MAX_LISTED_NAMES names for a message, quoted, and how many more there are: "'a', 'b' and 7 more"."""
    every = [shown(str(name)) for name in names]
    first = ", ".join(every[:MAX_LISTED_NAMES])
    return first if len(every) <= MAX_LISTED_NAMES else f"{first} and {len(every) - MAX_LISTED_NAMES} more"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun in the singular or plural: "1 tensor", "2 tensors", "2 entries"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
