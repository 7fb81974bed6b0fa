"""After an error of the device nothing of that answer is left, its sentence is ours, and the next answer is right.

The errors are injected where MLX would raise them: in the tower, the prefill, a step, or at the end, when all is waited
for.
"""

import gc
import os
import select
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import VLM, DeviceError, FastVLMWarning, OutOfMemoryError, load
from fastvlm_mlx.backend import residency
from fastvlm_mlx.config import DTYPES
from fastvlm_mlx.decoding import generate
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.prefix import Prefix
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.errors import CheckpointError, ImageError, PromptError
from fastvlm_mlx.network import memory

from .. import checkpoint

PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in range(8)]
FAILED = "[METAL] Command buffer execution failed: "
NO_MEMORY = f"{FAILED}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
TIMED_OUT = f"{FAILED}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."


@pytest.fixture
def fresh(small: VLM) -> Iterator[VLM]:
    small.images.clear()
    yield small
    small.images.clear()


def failing(message: str, after: int = 0, calls: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """What raises `message` as MLX would, or the first `after` times does what `calls` does."""
    count = iter(range(after))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(count, None) is not None:
            assert calls is not None
            return calls(*arguments, **options)
        raise RuntimeError(message)

    return call


@pytest.mark.parametrize("place", ["encode", "prefill", "step"])
def test_nothing_of_a_failed_answer_is_left(fresh: VLM, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    expected = [fresh.generate(PICTURES[0], "What is it?", max_tokens=6).token_ids]
    expected += [fresh.generate([PICTURES[0], PICTURES[1]], "And these?", max_tokens=6).token_ids]
    fresh.images.clear()
    chat = fresh.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=6)
    assert len(fresh.images) == 1 and chat.nbytes > 0
    with monkeypatch.context() as patch:
        patch.setattr(fresh.model, place, failing(NO_MEMORY, after=1 if place == "step" else 0, calls=fresh.model.step))
        with pytest.raises(OutOfMemoryError, match="not enough memory"):
            chat.ask("And this?", PICTURES[1], max_tokens=6)
        assert len(fresh.images) == 0  # the model reads the conversation's earlier picture for this answer as well
        assert chat.nbytes == 0 and len(chat.exchanges) == 1
        with pytest.raises(OutOfMemoryError):
            fresh.generate([PICTURES[0], PICTURES[2]], "And these?", max_tokens=6)
        assert len(fresh.images) == 0
    again = chat.ask("And this?", PICTURES[1], max_tokens=6)
    assert again.stats.reused_tokens == 0
    other = fresh.chat()
    other.ask("What is it?", PICTURES[0], max_tokens=6)
    assert other.ask("And this?", PICTURES[1], max_tokens=6).token_ids == again.token_ids
    assert fresh.generate(PICTURES[0], "What is it?", max_tokens=6).token_ids == expected[0]
    assert fresh.generate([PICTURES[0], PICTURES[1]], "And these?", max_tokens=6).token_ids == expected[1]


def test_an_error_that_shows_at_the_end_only(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array can be read although what should have written it has failed; what is waited for last tells."""
    with monkeypatch.context() as patch:
        patch.setattr(generate, "check_device", failing(TIMED_OUT))
        chunks: list[Any] = []
        with pytest.raises(DeviceError, match="GPU Timeout"):
            chunks += fresh.stream(PICTURES[0], "What is it?", max_tokens=3)
        assert not any(chunk.answer for chunk in chunks) and len(fresh.images) == 0


@pytest.mark.slow
def test_what_is_refused_or_broken_off_takes_nothing_away(fresh: VLM) -> None:
    chat = fresh.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    chunks = chat.stream("And now?", max_tokens=30)
    next(chunks)
    chunks.close()
    held = chat.nbytes
    with pytest.raises(PromptError):
        chat.ask("word " * 40_000)
    with pytest.raises(ImageError):
        chat.ask("And this?", "no-such-picture.png")
    assert len(fresh.images) == 1 and chat.nbytes == held > 0
    assert chat.ask("And now?", max_tokens=2).stats.reused_tokens > fresh.engine.image_tokens


def test_a_batch_that_fails_leaves_no_picture(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[Any] = [(picture, "What is it?") for picture in PICTURES[:3]]
    for on_error in ("raise", "return"):
        with monkeypatch.context() as patch:
            patch.setattr(fresh.model, "step", failing(NO_MEMORY, after=1, calls=fresh.model.step))
            with pytest.raises(OutOfMemoryError):
                fresh.batch(questions, max_tokens=6, on_error=on_error)
        assert len(fresh.images) == 0


def test_embeddings_and_attention_fail_the_same_way(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fresh.generate(PICTURES[0], "What?", max_tokens=2)
    fresh.images.clear()
    monkeypatch.setattr(fresh.model, "encode", failing(NO_MEMORY))
    with pytest.raises(OutOfMemoryError):
        fresh.encode_image(PICTURES[0])
    with pytest.raises(OutOfMemoryError):
        fresh.attention_map(PICTURES[0], "What?", answer)
    assert len(fresh.images) == 0


def test_loading_says_it_too(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastvlm_mlx.decoding.engine.read_weights", failing("[metal::malloc] Resource limit (9) exceeded.")
    )
    with pytest.raises(OutOfMemoryError, match="`bits=4`"):
        load(str(apple))


def test_a_fault_of_our_own_is_not_dressed_up(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.model, "prefill", failing("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match") as raised:
        fresh.generate(PICTURES[0], "What is it?")
    assert type(raised.value) is RuntimeError and len(fresh.images) == 0


# ---- pictures shown together ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> VLM:
    """A small random model in float32."""
    engine = Engine(open_random("small")).at(256)
    engine.load_weights(dtype="float32")
    return VLM(engine)


@pytest.fixture
def general(loaded: VLM, monkeypatch: pytest.MonkeyPatch) -> VLM:
    """The small model computed as on a GPU, in every thread, with the prefill queued behind the pictures."""
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "metal")
    return loaded


@pytest.mark.slow
def test_memory_does_not_grow_with_pictures_shown_together(general: VLM) -> None:
    """What the embeddings and the longer prompt themselves take aside, which is counted for."""

    def peak(count: int) -> int:
        general.images.clear()
        gc.collect()
        before = mx.get_active_memory()
        answer = general.generate([PICTURES[i] for i in range(count)], "What are they?", max_tokens=1)
        assert answer.stats.images == count
        return answer.stats.peak_memory_bytes - before - general.images.nbytes

    peak(1)
    one, four, eight = peak(1), peak(4), peak(8)
    assert four < 1.2 * one and eight < 1.4 * one


def test_pictures_are_kept_only_once_they_are_there(general: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another thread finds in the cache has been waited for: it could not wait for it itself."""
    general.images.clear()
    put, kept = general.images.put, []

    def note(key: bytes, embeddings: mx.array) -> None:
        with ThreadPoolExecutor(1) as pool:
            kept.append(pool.submit(lambda: float(embeddings.sum().item())).result(10))  # type: ignore[arg-type]
        put(key, embeddings)

    monkeypatch.setattr(general.images, "put", note)
    general.generate([PICTURES[0], PICTURES[1], PICTURES[0]], "What are they?", max_tokens=1)
    assert len(kept) == 2


@pytest.mark.slow
def test_threads_share_pictures_at_the_moment_they_are_encoded(general: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is held where its picture is queued, while the other asks about the same one."""
    expected = general.generate(PICTURES[0], "What is it?", max_tokens=4).token_ids
    general.images.clear()
    queued, answered = threading.Event(), threading.Event()
    encode, first = general.model.encode, threading.current_thread()

    def held(pixels: mx.array) -> mx.array:
        found = encode(pixels)
        if threading.current_thread() is first:
            queued.set()
        return found

    embed = general.model.embed

    def embed_when_answered(*arguments: Any) -> mx.array:
        if threading.current_thread() is first:
            assert answered.wait(20)
        return embed(*arguments)

    def other() -> list[int]:
        assert queued.wait(20)
        try:
            return general.generate(PICTURES[0], "What is it?", max_tokens=4).token_ids
        finally:
            answered.set()

    monkeypatch.setattr(general.model, "encode", held)
    monkeypatch.setattr(general.model, "embed", embed_when_answered)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(other)
        here = general.generate(PICTURES[0], "What is it?", max_tokens=4).token_ids
        assert there.result(30) == here == expected


# ---- numbers that overflow -----------------------------------------------------------------------


def overflowing(folder: Path, *layers: str) -> str:
    """The folder with the weights of layers made so large that numbers pass float16's 65504."""
    weights = checkpoint.read(folder)
    for name in weights:
        if any(layer in name for layer in layers):
            weights[name] = weights[name] * 1e4
    checkpoint.save(folder / "model.safetensors", weights)
    return str(folder)


@pytest.mark.parametrize("backend", ["cpu", "metal"])
def test_a_tower_that_overflows_float16_is_computed_in_float32(
    apple: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU when the prefill of what overflowed is queued already; in a conversation, with what was said before
    kept."""
    name = overflowing(apple, "conv_exp.reparam_conv")
    wide = load(name, dtype="float32")
    expected = np.array(wide.encode_image(PICTURES[0]))
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: backend)
    vlm = load(name, dtype="float16")
    with pytest.warns(FastVLMWarning, match="overflow in float16"):
        found = np.array(vlm.encode_image(PICTURES[0]))
    assert np.isfinite(found).all() and np.abs(found - expected).max() < 3e-3 * np.abs(expected).max()

    chat = vlm.chat()
    chat.ask("Hello.", max_tokens=2)
    with pytest.warns(FastVLMWarning, match="encoded again in float32"):
        answer = chat.ask("What are they?", [PICTURES[0], PICTURES[1], PICTURES[0]], max_tokens=6)
    assert len(vlm.images) == 2 and answer.stats.reused_tokens > 0
    assert chat.tokens == sum(map(len, vlm.engine.render([exchange.turn for exchange in chat.exchanges])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the pictures are there now: nothing overflows, and nothing is done again
        again = vlm.chat()
        again.ask("Hello.", max_tokens=2)
        repeated = again.ask("What are they?", [PICTURES[0], PICTURES[1], PICTURES[0]], max_tokens=6)
        same = vlm.generate(PICTURES[0], "What is it?", max_tokens=6)
    assert repeated.token_ids == answer.token_ids and again.nbytes == chat.nbytes
    assert chat.ask("And now?", max_tokens=4).token_ids == again.ask("And now?", max_tokens=4).token_ids
    vlm.images.clear()
    with pytest.warns(FastVLMWarning):
        batched = vlm.batch([(PICTURES[0], "What is it?")], max_tokens=6)
    assert batched[0].token_ids == same.token_ids


def test_an_overflow_that_float32_does_not_mend_is_said(apple: Path) -> None:
    vlm = load(overflowing(apple, "conv_exp.reparam_conv", "mm_projector.0", "mm_projector.2"), dtype="float16")
    for ask in (vlm.generate, vlm.encode_image):
        with pytest.raises(CheckpointError, match=r"overflow.*bfloat16"):
            ask(PICTURES[0])
    assert len(vlm.images) == 0


def test_nothing_is_kept_of_a_prefill_queued_behind_an_overflow(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU gets it: the positions are in the caches before anybody has looked at the picture's elements."""
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "metal")
    vlm = load(overflowing(apple, "conv_exp.reparam_conv", "mm_projector.0", "mm_projector.2"), dtype="float16")
    chat = vlm.chat()
    for _ in range(2):  # the second would find them there
        with pytest.raises(CheckpointError, match=r"overflow.*bfloat16"):
            chat.ask("What is it?", PICTURES[0], max_tokens=4)


def test_nothing_is_kept_of_a_prefill_whose_picture_was_interrupted(
    apple: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "metal")
    vlm = load(overflowing(apple, "conv_exp.reparam_conv"), dtype="float16")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    chat = vlm.chat()
    with monkeypatch.context() as broken:
        broken.setattr("fastvlm_mlx.decoding.pictures.encode_again", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("What is it?", PICTURES[0], max_tokens=4)
    with pytest.warns(FastVLMWarning, match="encoded again"):
        answer = chat.ask("What is it?", PICTURES[0], max_tokens=4)
    assert answer.token_ids == vlm.generate(PICTURES[0], "What is it?", max_tokens=4).token_ids


# ---- memory --------------------------------------------------------------------------------------


def test_embeddings_go_into_numpy_whatever_the_model_computes_in(apple: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        vlm = load(str(apple), dtype=dtype)
        one, two = vlm.encode_image(PICTURES[:2])
        assert np.array(one).dtype == np.float32 and np.asarray(two).shape == (4, 64)
        decoder = vlm.model.encode(mx.array(vlm.engine.pixels(PICTURES[0])[None]))[0]
        assert mx.array_equal(one.astype(decoder.dtype), decoder)


def test_a_gpu_keeps_a_gigabyte_of_freed_buffers_at_most(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1 << 40]

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "set_cache_limit", set_limit)
    load(str(apple))
    assert limits == [1 << 40]
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "metal")
    load(str(apple))
    assert limits[-1] == residency.CACHE_BYTES == 1_000_000_000
    limits[-1] = 5000
    load(str(apple))
    assert limits[-1] == 5000, "a limit that somebody has set lower stays"


def test_batches_and_embeddings_give_back_what_the_tower_took(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    fresh.encode_image(PICTURES[0])
    assert len(cleared) == 1
    fresh.batch([(PICTURES[0], "What is it?"), (None, "Hello.")], max_tokens=2)
    assert len(cleared) > 2


def test_a_model_larger_than_the_gpus_share_is_said_beforehand(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "metal")
    config = load(str(apple), dtype="float32").config
    for dtype in DTYPES:
        needed = memory.estimate(config, backend="metal", dtype=dtype).total
        for working_set, too_large in ((needed - 1, True), (needed, False)):
            monkeypatch.setattr(mx, "device_info", lambda size=working_set: {"max_recommended_working_set_size": size})
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always", FastVLMWarning)
                load(str(apple), dtype=dtype)
            said = [str(warning.message) for warning in found]
            assert len(said) == too_large, said
            assert not said or ("recommends at most" in said[0] and "`bits=4`" in said[0])
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "cpu")
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastVLMWarning)
        load(str(apple))


# ---- residency -----------------------------------------------------------------------------------


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The limits of resident memory that are set, the one in force last; at the end that is the first again."""
    found = [7]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1 << 40})

    def set_limit(limit: int) -> int:
        found.append(limit)
        return found[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    yield found
    gc.collect()  # conversations hold it
    assert found[-1] == 7


@pytest.mark.slow
def test_a_conversation_asks_for_residency_once(general: VLM, limits: list[int]) -> None:
    chat = general.chat()
    for _ in range(3):
        chat.ask("Hello.", max_tokens=2)
    general.generate(None, "Hello.", max_tokens=2)
    assert limits == [7, 1 << 40]
    other = general.chat()
    other.ask("Hello.", max_tokens=2)
    del chat
    gc.collect()
    assert limits == [7, 1 << 40]
    del other
    gc.collect()
    assert limits == [7, 1 << 40, 7]
    general.generate(None, "Hello.", max_tokens=2)
    assert limits == [7, 1 << 40, 7, 1 << 40, 7]


def test_an_answer_that_fails_puts_the_limit_back_and_tells_what_failed_first(
    general: VLM, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general.model, "prefill", failing(NO_MEMORY))
    monkeypatch.setattr(mx, "synchronize", failing(TIMED_OUT))  # the device's stored error
    with pytest.raises(OutOfMemoryError) as raised:
        general.generate(PICTURES[0], "What is it?", max_tokens=2)
    assert str(raised.value.__cause__) == NO_MEMORY
    assert limits == [7, 1 << 40, 7] and len(general.images) == 0


@pytest.mark.slow
def test_what_the_device_has_stored_is_taken_before_the_next_answer(
    general: VLM, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while residency is held, where nothing else waits for the device."""
    chat = general.chat()
    chat.ask("Hello.", max_tokens=2)
    waited: list[int] = []
    monkeypatch.setattr(mx, "synchronize", lambda: waited.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(general.model, "prefill", failing(NO_MEMORY))
        with pytest.raises(OutOfMemoryError):
            chat.ask("What is it?", PICTURES[0], max_tokens=2)
    assert waited and limits == [7, 1 << 40]
    waited.clear()
    chat.ask("What is it?", max_tokens=2)
    assert waited, "an answer ends when the device has told of no error"
    prefix = Prefix()
    with pytest.raises(ZeroDivisionError), prefix.answering(general.model, [1, 2]):
        raise ZeroDivisionError
    assert prefix.layers == [] and prefix.held == []


# ---- forked children -----------------------------------------------------------------------------


def test_a_child_forked_after_a_model_was_loaded_is_told(fresh: VLM) -> None:
    """MLX's threads are the parent's: without a word the child would wait for them for ever."""
    calls: list[Callable[[], object]] = [
        lambda: fresh.generate(PICTURES[0], "What is it?", max_tokens=1),
        lambda: next(fresh.stream(None, "Hello.", max_tokens=1)),
        lambda: fresh.batch([(PICTURES[0], "What is it?")], max_tokens=1),
        lambda: fresh.chat().ask("Hello.", max_tokens=1),
        lambda: fresh.encode_image(PICTURES[0]),
        lambda: fresh.engine.load_weights(),
    ]
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        told = b""
        try:
            for call in calls:
                try:
                    call()
                    told += b"?"
                except DeviceError as error:
                    told += b"." if "spawn" in str(error) else b"!"
        finally:
            os.write(writer, told)
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], 20)
        told = os.read(reader, 100) if ready else b"the child hangs"
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert told == b"." * len(calls)
    assert fresh.generate(PICTURES[0], "What is it?", max_tokens=1).text is not None
