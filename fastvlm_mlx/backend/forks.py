"""The process that MLX computes in: its threads and its device do not follow into a forked child, where an answer would
hang."""

import os

from ..errors import DeviceError

_home: int | None = None  # the process whose MLX has begun to compute


def check_process() -> None:
    """Take this process for MLX's, or raise DeviceError in a child forked from the one that it has computed in."""
    global _home
    if _home is None:
        _home = os.getpid()
    elif _home != os.getpid():
        raise DeviceError(
            "This process was forked after a model was loaded, and MLX does not work in a forked child; start workers "
            'by multiprocessing\'s "spawn" method, and load the model in each.'
        )
