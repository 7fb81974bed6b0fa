"""Room for frames: calls at no depth fetch memory again and again."""

import resource
from collections.abc import Callable
from types import FunctionType

from fastvlm_mlx.cli import frames

CALLS, DEPTH = 200, 150


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def nothing() -> None:
    pass


def call_it_often() -> int:
    """Page faults of many calls at this depth."""
    before = faults()
    for _ in range(CALLS):
        nothing()
    return faults() - before


def worst(depth: int = DEPTH) -> int:
    """The most of any depth from here on."""
    return max(call_it_often(), worst(depth - 1)) if depth else call_it_often()


def beginning_anywhere(function: Callable[[], int]) -> int:
    """The most of a function below frames of 16 sizes: which depth has its calls on a border depends on what lies above."""
    found = []
    for slots in range(16):

        def begin() -> int:
            return function()

        assert isinstance(begin, FunctionType)
        begin.__code__ = begin.__code__.replace(co_stacksize=begin.__code__.co_stacksize + slots)
        found.append(begin())
    return max(found)


@frames.with_room
def roomy() -> int:
    return worst()


def test_no_depth_has_a_page_fault_per_call() -> None:
    assert beginning_anywhere(worst) >= CALLS, "Python no longer frees its chunks: `cli/frames.py` can go"
    assert beginning_anywhere(roomy) < CALLS // 10
