"""Room for frames: calls at no depth fetch memory again and again."""

import resource

from fastvlm_mlx.cli import frames

CALLS, DEPTH = 1000, 150


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


def plain() -> int:
    return worst()


@frames.with_room
def roomy() -> int:
    return worst()


def test_no_depth_has_a_page_fault_per_call() -> None:
    assert plain() >= CALLS, "Python no longer frees its chunks: `cli/frames.py` can go"
    assert roomy() < CALLS // 10
