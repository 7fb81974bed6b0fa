"""The limit of memory that stays resident on Metal: raised once for answers in several threads, and put back whatever
happens."""

import threading
import time

import mlx.core as mx
import pytest

from fastvlm_mlx.backend.residency import wired

BEFORE, RAISED = 7, 1000


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every limit that is set, the one in force last."""
    found = [BEFORE]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": RAISED})

    def set_limit(limit: int) -> int:
        before = found[-1]
        time.sleep(1e-5)  # another thread's turn
        found.append(limit)
        return before

    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    return found


def test_answers_in_many_threads_raise_it_once(limits: list[int]) -> None:
    together = threading.Barrier(8)

    def answer() -> None:
        for _ in range(200):
            with wired("metal"):
                pass
        with wired("metal"):
            together.wait(10)
            assert limits[-1] == RAISED

    with wired("metal"):
        threads = [threading.Thread(target=answer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert limits == [BEFORE, RAISED, BEFORE]


def test_many_threads_leave_it_as_it_was(limits: list[int]) -> None:
    def answer() -> None:
        for _ in range(300):
            with wired("metal"):
                pass

    threads = [threading.Thread(target=answer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limits[-1] == BEFORE
    assert limits[1::2] == [RAISED] * (len(limits) // 2) and set(limits[::2]) == {BEFORE}


def test_it_is_put_back_after_an_error(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("[metal::malloc] Attempting to allocate too much")

    with pytest.raises(ZeroDivisionError), wired("metal"):
        raise ZeroDivisionError
    assert limits[-1] == BEFORE
    monkeypatch.setattr(mx, "synchronize", fails)
    with pytest.raises(RuntimeError, match="too much"), wired("metal"):
        pass
    assert limits[-1] == BEFORE


def test_elsewhere_nothing_is_set(limits: list[int]) -> None:
    for backend in ("cpu", "cuda"):
        with wired(backend):
            pass
    assert limits == [BEFORE]
