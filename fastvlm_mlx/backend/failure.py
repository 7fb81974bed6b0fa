"""What MLX, or the system under it, says when it fails -> a sentence with what to do.

MLX raises RuntimeError and ValueError; its messages begin with where they are from, in square brackets.
"""

import re

MEMORY = "There is not enough memory; use a smaller model, `bits=4` or a lower `resolution`."
NO_ROOM = re.compile(
    r"\[metal::malloc\]|\[malloc|out ?of ?memory|insufficient memory|unable to allocate|cannot allocate|bad_alloc", re.I
)
NO_ADDRESSES = re.compile(
    r"failed to map segment|cannot allocate memory|cannot apply additional memory|numpy C-extensions failed", re.I
)
GPU = re.compile(r"\[METAL\]|\[metal::", re.I)
MLX = re.compile(r"\[[\w:. ]+\] |There is no Stream\(")
SHOWN = 300  # characters of a message


def explained(error: BaseException) -> str | None:
    """The sentence for an error that MLX or a lack of memory caused; None for any other."""
    if isinstance(error, MemoryError):
        return MEMORY
    text = " ".join(str(error).split())[:SHOWN]
    if isinstance(error, ImportError) and NO_ADDRESSES.search(str(error)) and _is_limited():
        return (
            f"The memory that this process may use (ulimit -v) is too little to load its libraries ({text[:100]}); raise the limit."
        )
    if not isinstance(error, (RuntimeError, ValueError)):
        return None
    if NO_ROOM.search(text):
        return MEMORY
    if GPU.match(text):
        return (
            f"The GPU failed, most often for lack of memory ({text}); close other programs, use a smaller model, `bits=4` or a "
            "lower `resolution`, and try again."
        )
    if MLX.match(text):
        return (
            f"MLX failed ({text}); try again with `dtype='float32'`, with another model, or with the newest mlx "
            "(pip install -U mlx)."
        )
    return None


def _is_limited() -> bool:
    """Whether there is a limit on the addresses of this process."""
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
