"""Questions answered together: each answer is the one it gets alone, whoever joins, leaves, fails or is cancelled
beside it.
"""

import gc
import json
import random
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx
from fastvlm_mlx import VLM, Answer, CancelledError, Chunk, DeviceError, FastVLMError, OutOfMemoryError
from fastvlm_mlx.backend.ops import forms_of
from fastvlm_mlx.decoding.answer import finish
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options, Request
from fastvlm_mlx.decoding.row import Row
from fastvlm_mlx.decoding.rows import SHARED_PREFILL_CHUNK, Rows
from fastvlm_mlx.decoding.sampling import Sampler
from fastvlm_mlx.decoding.scheduler import MAX_UNREAD_CHUNKS, Scheduler
from fastvlm_mlx.errors import CheckpointError, OptionError, PromptError
from fastvlm_mlx.inputs.pieces import Piece
from fastvlm_mlx.inputs.prompt import Turn
from fastvlm_mlx.network.kv_cache import KVCache

PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in range(12)]
TEXT = "what is the colour of this thing and how many are there 图里有什么 left? Describe the image."
NO_MEMORY = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer)."

Asked = tuple[Request, Options]


@pytest.fixture
def fresh(small: VLM) -> Iterator[VLM]:
    small.images.clear()
    yield small
    small.images.clear()


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return fastvlm_mlx.load("tiny")


def mixed(engine: Engine, seed: int, count: int) -> list[Asked]:
    """Questions of any length about none, one or two pictures, drawn in any way and cut anywhere."""
    rng = random.Random(seed)
    asked = []
    for _ in range(count):
        pictures = rng.sample(PICTURES, rng.choice([0, 1, 1, 1, 2]))
        prompt = " ".join(rng.choices(TEXT.split(), k=rng.choice([1, 3, 6, 12, 40])))
        options = Options(
            max_tokens=rng.choice([1, 5, 20]), temperature=rng.choice([0, 0, 0.7, 1.0, 2.0]),
            top_p=rng.choice([1.0, 0.9, 0.5]), seed=rng.randrange(1 << 64), top_k=rng.choice([0, 0, 5]),
            min_p=rng.choice([0, 0, 0.1]), repetition_penalty=rng.choice([1, 1, 1.3]),
            stop=rng.choice([(), (), ("e",)]), logprobs=rng.choice([None, None, 2]),
        )  # fmt: skip
        asked.append((engine.prepare(pictures, prompt), options))
    return asked


def alone(engine: Engine, asked: Asked) -> Answer:
    return finish(stream(engine, *asked))


def said(answer: Answer) -> tuple[list[int], str, str, list[str]]:
    likely = [] if answer.logprobs is None else [token.token for token in answer.logprobs]
    return answer.token_ids, answer.text, answer.finish_reason, likely


def together(engine: Engine, asked: list[Asked], **how: Any) -> list[Answer]:
    with Scheduler(engine, **how) as scheduler:
        pending = [scheduler.submit(request, options) for request, options in asked]
        return [each.result(60) for each in pending]


def in_turns(engine: Engine, asked: list[Asked], **how: Any) -> list[Answer]:
    """The answers, with the turns taken here."""
    found: list[list[Any]] = [[] for _ in asked]
    rows = Rows(engine, **how)
    for each, results in zip(asked, found, strict=True):
        rows.add(row_of(engine, each, results))
    while rows.busy:
        rows.turn()
    return [results[-1].answer for results in found]


def row_of(engine: Engine, asked: Asked, found: list[Any], salt: bytes = b"") -> Row:
    return Row(engine, *asked, found.append, salt=salt)


def words(engine: Engine, count: int, letter: str = "0") -> Request:
    """A question of so many positions, which shares no more with one of another letter than what comes before it."""
    before = engine.prepare(None, "").prompt_tokens
    request = engine.prepare(None, letter * (count - before))
    assert request.prompt_tokens == count
    return request


# ---- answers are those given alone ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_mixed_questions_are_answered_as_alone(small: VLM, seed: int) -> None:
    asked = mixed(small.engine, seed, 24)
    expected = [alone(small.engine, each) for each in asked]
    for how in ({}, {"max_rows": 3, "pool_bytes": 0}, {"exact": True}):
        small.images.clear()
        found = together(small.engine, asked, **how)
        assert [said(answer) for answer in found] == [said(answer) for answer in expected]
    figures = ("images", "image_tokens", "prompt_tokens", "completion_tokens")
    for one, other in zip(found, expected, strict=True):
        assert all(getattr(one.stats, name) == getattr(other.stats, name) for name in figures)


@pytest.mark.slow
def test_one_step_ahead_of_what_is_read_nothing_changes(small: VLM) -> None:
    """As a GPU is kept busy: a step is under way before the tokens it began with have been read."""
    asked = mixed(small.engine, 5, 24)
    with forms_of("metal"):
        expected = [said(alone(small.engine, each)) for each in asked]
        for how in ({}, {"max_rows": 5, "exact": True}, {"fill": True}):
            small.images.clear()
            assert [said(answer) for answer in in_turns(small.engine, asked, **how)] == expected


@pytest.mark.slow
def test_a_thousand_mixed_questions_are_answered_as_alone(tiny: VLM) -> None:
    asked = mixed(tiny.engine, 0, 1000)
    expected = [said(alone(tiny.engine, each)) for each in asked]
    assert [said(answer) for answer in together(tiny.engine, asked)] == expected


@pytest.mark.slow
def test_a_trained_model_answers_as_alone(tiny: VLM) -> None:
    asked = mixed(tiny.engine, 1, 20)
    expected = [said(alone(tiny.engine, each)) for each in asked]
    assert [said(answer) for answer in together(tiny.engine, asked)] == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_held_to_a_schema_go_on_beside_others(small: VLM, ahead: bool) -> None:
    """They have to be told each token before the next can be drawn, and end without a token that says so."""
    pytest.importorskip("llguidance", reason="the extra `schema` is not installed")
    engine = small.engine
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22, 333]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    asked = mixed(engine, 7, 8)
    for seed in range(4):
        asked.insert(2 * seed, (engine.prepare(PICTURES[seed], "Hi"), Options(40, 1.0, seed=seed, schema=schema)))
    with forms_of("metal" if ahead else "cpu"):
        expected = [alone(engine, each) for each in asked]
        assert [said(answer) for answer in in_turns(engine, asked)] == [said(answer) for answer in expected]
    held_to_it = [json.loads(expected[2 * seed].text) for seed in range(4)]
    assert all(found in ({"n": 1}, {"n": 22}, {"n": 333}) for found in held_to_it)


def test_rows_held_to_a_schema_keep_no_others_waiting(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has the draws of the others before the last tokens are read, as where there is no schema."""
    pytest.importorskip("llguidance", reason="the extra `schema` is not installed")
    engine = small.engine
    log: list[str] = []
    draw, accept = Sampler.__call__, Sampler.accept

    def drawing(self: Sampler, logits: mx.array) -> mx.array:
        log.append("draw held" if self.waits else "draw free")
        return draw(self, logits)

    def accepting(self: Sampler, token: int) -> None:
        log.append("told")
        accept(self, token)

    monkeypatch.setattr(Sampler, "__call__", drawing)
    monkeypatch.setattr(Sampler, "accept", accepting)
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 50}
    with forms_of("metal"):
        rows = Rows(engine)
        for options in (Options(40, schema=schema), Options(40, 1.0, seed=1, stop_tokens=())):
            rows.add(row_of(engine, (engine.prepare(None, "Hi"), options), []))
        while len(rows.decoding) < 2:
            rows.turn()
        log.clear()
        for _ in range(5):
            rows.turn()
    assert log == ["draw free", "told", "told", "draw held"] * 5


def test_options_do_not_leak_from_one_question_to_another(small: VLM) -> None:
    request = small.engine.prepare(PICTURES[0], "What is it?")
    every = [
        Options(9), Options(3), Options(9, 1.5, seed=1), Options(9, 1.5, seed=2), Options(9, 1.5, 0.3, seed=1),
        Options(9, 0.0, 0.3),
    ]  # fmt: skip
    every += [Options(9, stop_tokens=(alone(small.engine, (request, Options(9))).token_ids[4],))]
    expected = [alone(small.engine, (request, options)).token_ids for options in every]
    assert len({tuple(ids) for ids in expected}) == len(every) - 1  # what is taken greedily has no use for top_p
    found = together(small.engine, [(request, options) for options in every])
    assert [answer.token_ids for answer in found] == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_of_rows_that_draw_is_sent_off_at_once(small: VLM, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """With all that their samplers keep: keys, the tokens a penalty looks at, log-probabilities."""
    engine = small.engine
    options = Options(20, 1.0, 0.9, seed=1, repetition_penalty=1.3, logprobs=2, stop_tokens=())
    sent: list[int] = []
    async_eval = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: [sent.append(len(arrays)), async_eval(*arrays)][1])
    with forms_of("metal" if ahead else "cpu"):
        rows = Rows(engine)
        for picture in PICTURES[:3]:
            rows.add(row_of(engine, (engine.prepare(picture, "Hi"), options), []))
        while len(rows.decoding) < 3:
            rows.turn()
        sent.clear()
        for _ in range(5):
            rows.turn()
    assert sent == [1 + 3 * 5] * 5  # the tokens, and of each row a key, a window and three of its log-probabilities


def test_exact_gives_the_same_bits_whoever_else_is_there(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[mx.array] = []
    step = small.model.step

    def note(tokens: mx.array, caches: Any) -> mx.array:
        logits = step(tokens, caches)
        seen.append(logits[0])
        assert len(tokens) == 6
        return logits

    monkeypatch.setattr(small.model, "step", note)
    one = (words(small.engine, 700), Options(12, stop_tokens=()))
    logits = []
    for others in (0, 5):
        seen.clear()
        rows = Rows(small.engine, max_rows=6, exact=True)
        found: list[Any] = []
        if others:  # and what they share is there already
            rows.add(row_of(small.engine, (words(small.engine, 690), Options(1)), found))
            while rows.busy:
                rows.turn()
        for asked in [one, *mixed(small.engine, 3, others)]:
            rows.add(row_of(small.engine, asked, found))
        while rows.busy:
            rows.turn()
        logits.append(mx.stack(seen[:11]))
        assert (rows.pool.hits > 0) == (others > 0)
    assert mx.array_equal(logits[0], logits[1])


# ---- turns ---------------------------------------------------------------------------------------


def test_a_turn_admits_one_picture_or_one_chunk_and_steps_with_everyone(
    fresh: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = fresh.engine, fresh.model
    log: list[tuple[str, int]] = []
    encode, step, decoder = model.encode, model.step, type(model.text).__call__

    def noting(self: Any, x: mx.array, cache: Any = None) -> mx.array:
        if x.shape[1] > 1:
            log.append(("chunk", x.shape[1]))
        return decoder(self, x, cache)

    monkeypatch.setattr(type(model.text), "__call__", noting)
    monkeypatch.setattr(model, "encode", lambda x: [log.append(("encode", len(x))), encode(x)][1])
    monkeypatch.setattr(model, "step", lambda x, caches: [log.append(("step", len(x))), step(x, caches)][1])
    rows = Rows(engine)
    found: list[Any] = []
    rows.add(row_of(engine, (words(engine, 900), Options(200, stop_tokens=())), found))
    turns = []
    for number in range(12):
        if number == 1:
            rows.add(
                row_of(engine, (engine.prepare([PICTURES[0], PICTURES[1]], "Hi"), Options(3, stop_tokens=())), found)
            )
            rows.add(row_of(engine, (words(engine, 1000, "1"), Options(9, stop_tokens=())), found))
        log.clear()
        rows.turn()
        turns.append(list(log))
    assert turns[0] == [("chunk", 900), ("step", 1)]  # alone, in one piece
    assert turns[1] == turns[2] == [("encode", 1), ("step", 1)]
    assert turns[3][0][0] == "chunk" and turns[3][1] == ("step", 2)
    assert turns[4][0] == ("chunk", SHARED_PREFILL_CHUNK) and turns[4][1] == ("step", 2)
    assert turns[5][0][0] == "chunk" and turns[5][1] == ("step", 2)  # the rest of it, while one of the others ends
    assert all(len(turn) == 1 for turn in turns[6:])


def test_rows_join_and_leave_between_steps(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh.engine
    widths: list[int] = []
    step = fresh.model.step
    monkeypatch.setattr(fresh.model, "step", lambda x, caches: [widths.append(len(x)), step(x, caches)][1])
    rows = Rows(engine, max_rows=3)
    found: list[Any] = []
    for length in (9, 2, 4, 5):
        rows.add(row_of(engine, (engine.prepare(None, "Hi"), Options(length, stop_tokens=())), found))
    while rows.busy:
        rows.turn()
    assert widths == [1, 2, 2, 3, 3, 2, 2, 1]  # one joins in each turn; the last waits until the second has left
    assert [len(chunk.answer.token_ids) for chunk in found if chunk.answer] == [2, 4, 5, 9]


def test_a_long_prompt_is_not_starved_by_short_ones(fresh: VLM) -> None:
    engine = fresh.engine
    order: list[str] = []
    rows = Rows(engine, max_rows=4)

    def ask(name: str, request: Request) -> None:
        def finished(chunk: Chunk | Exception) -> None:
            if isinstance(chunk, Chunk) and chunk.answer:
                order.append(name)

        rows.add(Row(engine, request, Options(2, stop_tokens=()), finished))

    ask("first", words(engine, 40))
    rows.turn()
    ask("long", words(engine, 1020))
    for _ in range(20):
        ask("short", words(engine, 40))
    while rows.busy:
        rows.turn()
    assert order.index("long") == 1


# ---- leaving early -------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", range(7))
def test_cancelling_frees_a_row_within_two_steps(fresh: VLM, wait: int) -> None:
    engine = fresh.engine
    with Scheduler(engine) as scheduler:
        pending = scheduler.submit(engine.prepare(PICTURES[0], "Hi"), Options(900, stop_tokens=()))
        chunks = iter(pending)
        for _ in range(wait):
            next(chunks)
        pending.cancel()
        with pytest.raises(CancelledError, match="cancelled"):
            pending.result(10)
        with pytest.raises(CancelledError):
            list(chunks)
        assert (scheduler.load.rows, scheduler.load.queued) == (0, 0)
        again = scheduler.submit(engine.prepare(PICTURES[0], "Hi"), Options(3)).result(10)
        assert wait == 0 or again.stats.reused_tokens == again.stats.prompt_tokens - 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cancelled_row_takes_part_in_no_further_step(
    fresh: VLM, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """As a CPU steps, and as a GPU, which is one step ahead of what has been read."""
    engine = fresh.engine
    asked = [(engine.prepare(picture, "Hi"), Options(40, stop_tokens=())) for picture in PICTURES[:3]]
    expected = [said(alone(engine, each)) for each in asked]
    widths: list[int] = []
    step = fresh.model.step
    monkeypatch.setattr(fresh.model, "step", lambda x, caches: [widths.append(len(x)), step(x, caches)][1])
    with forms_of("metal" if ahead else "cpu"):
        rows = Rows(engine)
        found: list[list[Any]] = [[] for _ in asked]
        every = [row_of(engine, each, results) for each, results in zip(asked, found, strict=True)]
        for row in every:
            rows.add(row)
        for _ in range(9):
            rows.turn()
        assert widths[-1] == 3
        every[1].cancelled = True
        rows.turn()
        assert widths[-1] == 2 and isinstance(found[1][-1], CancelledError)
        while rows.busy:
            rows.turn()
    for place in (0, 2):
        assert said(found[place][-1].answer) == expected[place]
    assert widths[:10] == [1, 2, *[3] * 7, 2]


def test_what_is_cancelled_while_it_waits_is_never_begun(fresh: VLM) -> None:
    rows = Rows(fresh.engine, max_rows=1)
    found: list[Any] = []
    for _ in range(3):
        rows.add(row_of(fresh.engine, (fresh.engine.prepare(None, "Hi"), Options(4, stop_tokens=())), found))
    rows.turn()
    rows.waiting[0].cancelled = True
    while rows.busy:
        rows.turn()
    kinds = [type(each) for each in found if isinstance(each, Exception) or each.answer]
    assert kinds == [CancelledError, Chunk, Chunk]


def held() -> tuple[int, int]:
    """Rows and caches that are there."""
    gc.collect()
    every = gc.get_objects()
    return sum(type(each) is Row for each in every), sum(type(each) is KVCache for each in every)


def cancel_at_random(vlm: VLM, count: int, seed: int) -> None:
    """Questions of which each is cancelled at some turn, or none: nothing is left of any, and nobody else notices."""
    engine, rng = vlm.engine, random.Random(seed)
    asked = mixed(engine, seed, 8)
    expected = [said(alone(engine, each)) for each in asked]
    vlm.images.clear()
    rows = Rows(engine, max_rows=4, pool_bytes=2_000_000)
    finished = cancelled = begun = 0
    under_way: list[tuple[int, Row, list[Any]]] = []
    before = held()
    while cancelled < count:
        while len(under_way) < 6:
            number = begun % len(asked)
            found: list[Any] = []
            row = row_of(engine, asked[number], found)
            rows.add(row)
            under_way.append((number, row, found))
            begun += 1
        if rng.random() < 0.3:
            _, row, _ = rng.choice(under_way)
            row.cancelled = True
        rows.turn()
        for number, row, found in list(under_way):
            last = found[-1] if found else None
            if isinstance(last, CancelledError):
                assert row.cancelled
                cancelled += 1
            elif isinstance(last, Chunk) and last.answer is not None:
                assert said(last.answer) == expected[number]
                finished += 1
            else:
                assert not isinstance(last, Exception), last
                continue
            under_way.remove((number, row, found))
        assert rows.under_way <= 4 and rows.pool.nbytes <= 2_000_000
    for _, row, _ in under_way:
        row.cancelled = True
    rows.turn()
    assert not rows.busy and finished > 0
    row, found, last = None, [], None  # type: ignore[assignment]
    under_way.clear()
    rows.pool.clear()
    assert held() == before


@pytest.mark.slow
def test_cancelled_at_any_step_nothing_is_left(fresh: VLM) -> None:
    cancel_at_random(fresh, 10, 0)
    gc.collect()
    fresh.images.clear()
    before = mx.get_active_memory()
    cancel_at_random(fresh, 60, 1)
    gc.collect()
    fresh.images.clear()
    assert mx.get_active_memory() <= before + 100_000


@pytest.mark.slow
def test_cancelled_a_thousand_times_nothing_is_left(fresh: VLM) -> None:
    cancel_at_random(fresh, 10, 0)
    gc.collect()
    fresh.images.clear()
    before = mx.get_active_memory()
    cancel_at_random(fresh, 1000, 2)
    gc.collect()
    fresh.images.clear()
    assert mx.get_active_memory() <= before + 100_000


def test_a_finished_answer_keeps_neither_pixels_nor_caches(fresh: VLM) -> None:
    engine = fresh.engine
    with Scheduler(engine, pool_bytes=0) as scheduler:
        before = held()
        request = engine.prepare(PICTURES[0], "Hi")
        pixels = weakref.ref(request.pixels[0])
        pending = scheduler.submit(request, Options(3))
        del request
        pending.result(10)
        deadline = time.monotonic() + 10
        while (pixels() is not None or held() != before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pixels() is None and held() == before


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_in_the_middle_fails_its_row_and_no_other(
    fresh: VLM, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """A step that cannot be computed for one row, after its third token; and a sampler that has nothing to draw."""
    with forms_of("metal" if ahead else "cpu"):
        fail_in_the_middle(fresh, monkeypatch)


def fail_in_the_middle(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh.engine
    asked = [(engine.prepare(picture, "Hi"), Options(8, stop_tokens=())) for picture in PICTURES[:5]]
    expected = [said(alone(engine, each)) for each in asked]
    step = fresh.model.step
    rows = Rows(engine)
    found: list[list[Any]] = [[] for _ in asked]
    every = [row_of(engine, each, results) for each, results in zip(asked, found, strict=True)]

    def failing_step(tokens: mx.array, caches: Any) -> mx.array:
        poisoned = every[1].entry is not None and len(every[1].draft.tokens) >= 3
        layers = caches[0].rows if hasattr(caches[0], "rows") else [caches[0]]
        if poisoned and any(layer is every[1].cache[0] for layer in layers):
            for layer in layers:  # half done
                layer.update(*(mx.zeros((1, 1, 1, 32)),) * 2)
            raise ValueError("this row cannot be computed")
        return step(tokens, caches)

    def failing_draw(logits: mx.array) -> mx.array:
        raise ValueError("nothing may come next")

    monkeypatch.setattr(fresh.model, "step", failing_step)
    for row in every:
        rows.add(row)
    for _ in range(4):
        rows.turn()
    every[2].sampler = failing_draw  # type: ignore[assignment]
    failing_draw.waits = failing_draw.greedy = failing_draw.ended = False  # type: ignore[attr-defined]
    failing_draw.accept = lambda token: None  # type: ignore[attr-defined]
    failing_draw.kept = ()  # type: ignore[attr-defined]
    while rows.busy:
        rows.turn()
    assert str(found[1][-1]) == "this row cannot be computed" and str(found[2][-1]) == "nothing may come next"
    for place in (0, 3, 4):
        assert said(found[place][-1].answer) == expected[place]
    assert len(fresh.images) == 3  # what may lie unfinished is dropped, the others' pictures stay


def test_a_listener_that_fails_ends_its_answer_only(fresh: VLM) -> None:
    engine = fresh.engine
    asked = (engine.prepare(PICTURES[0], "Hi"), Options(8, stop_tokens=()))
    heard: list[Any] = []
    thread: set[str] = set()

    def broken(chunk: Any) -> None:
        raise BrokenPipeError("nobody listens")

    def listening(chunk: Any) -> None:
        heard.append(chunk)
        thread.add(threading.current_thread().name)

    with Scheduler(engine) as scheduler:
        bad = scheduler.submit(*asked, listener=broken)
        good = scheduler.submit(*asked, listener=listening)
        with pytest.raises(FastVLMError, match=r"BrokenPipeError.*nobody listens"):
            bad.result(10)
        assert said(good.result(10)) == said(alone(engine, asked))
    assert "".join(chunk.text for chunk in heard) == good.result().text and heard[-1].answer is good.result()
    assert thread == {"fastvlm-scheduler"}


def test_a_listener_that_fails_at_the_end_ends_nothing(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answer, with what went wrong, and where the scheduler is closed: everybody else is told all the same."""
    engine = fresh.engine
    told: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda found: told.append(found.exc_value))

    def gone(chunk: Any) -> None:
        if not isinstance(chunk, Chunk) or chunk.answer is not None:
            raise RuntimeError("Event loop is closed")

    endless = (engine.prepare(None, "Hi"), Options(900, stop_tokens=()))
    with Scheduler(engine) as scheduler:
        whole = scheduler.submit(endless[0], Options(3), listener=gone)
        answer = whole.result(10)
        cancelled = scheduler.submit(*endless, listener=gone)
        next(iter(cancelled))
        cancelled.cancel()
        with pytest.raises(CancelledError, match="cancelled"):
            cancelled.result(10)
        assert scheduler.submit(endless[0], Options(3)).result(10).token_ids == answer.token_ids
        assert whole.result() is answer and list(whole)[-1].answer is answer
        closed = [scheduler.submit(*endless, listener=gone) for _ in range(3)]
    for each in closed:
        with pytest.raises(CancelledError, match="closed"):
            each.result(10)
    assert [str(error) for error in told] == ["Event loop is closed"] * 5


@pytest.mark.parametrize("place", ["prefill", "step"])
def test_whoever_keeps_an_error_keeps_neither_rows_nor_caches(
    fresh: VLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Nor must they wait for the garbage collector: where the memory ran out, it would run out again."""

    def fail(*_: object) -> mx.array:
        raise ValueError("it cannot be computed")

    rows = Rows(fresh.engine, pool_bytes=0)
    errors: list[Any] = []
    before = held()
    monkeypatch.setattr(fresh.model, place, fail)
    for picture in PICTURES[:3]:
        rows.add(Row(fresh.engine, fresh.engine.prepare(picture, "Hi"), Options(9, stop_tokens=()), errors.append))
    gc.disable()
    try:
        while rows.busy:
            rows.turn()
        every = gc.get_objects()
        left = sum(type(each) is Row for each in every), sum(type(each) is KVCache for each in every)
    finally:
        gc.enable()
    failed = [error for error in errors if isinstance(error, ValueError)]
    assert left == before and len(failed) == 3 and "in fail" in failed[0].__notes__[0]


def test_a_picture_that_cannot_be_encoded_fails_its_own_question(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = fresh.model.encode
    bad = mx.array(fresh.engine.pixels(PICTURES[1]))
    monkeypatch.setattr(fresh.model, "encode", lambda x: encode(x) * (mx.inf if mx.array_equal(x[0], bad) else 1))
    with Scheduler(fresh.engine) as scheduler:
        asked = [(fresh.engine.prepare(picture, "Hi"), Options(6)) for picture in PICTURES[:3]]
        pending = [scheduler.submit(*each) for each in asked]
        with pytest.raises(CheckpointError, match="overflow"):
            pending[1].result(10)
        for place in (0, 2):
            assert said(pending[place].result(10)) == said(alone(fresh.engine, asked[place]))


@pytest.mark.parametrize("place", ["encode", "prefill", "step"])
def test_when_the_device_fails_nothing_is_kept_and_the_next_answer_is_right(
    fresh: VLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = fresh.engine
    asked = [(engine.prepare(picture, "Hi"), Options(6, stop_tokens=())) for picture in PICTURES[:3]]
    expected = [said(alone(engine, each)) for each in asked]
    fresh.images.clear()
    with Scheduler(engine) as scheduler:
        with monkeypatch.context() as patch:

            def fail(*_: object) -> mx.array:
                raise RuntimeError(NO_MEMORY)

            patch.setattr(fresh.model, place, fail)
            for each in [scheduler.submit(*each) for each in asked]:
                with pytest.raises(OutOfMemoryError, match="not enough memory"):
                    each.result(10)
            assert len(fresh.images) == 0 and scheduler.load.pool_bytes == 0 and scheduler.load.rows == 0
        assert [said(each.result(10)) for each in [scheduler.submit(*each) for each in asked]] == expected


def test_an_error_that_shows_at_an_answers_end_only(fresh: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(backend: str) -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:x).")

    monkeypatch.setattr("fastvlm_mlx.backend.residency.check_device", fail)
    with Scheduler(fresh.engine) as scheduler, pytest.raises(DeviceError, match="GPU Timeout"):
        scheduler.submit(fresh.engine.prepare(PICTURES[0], "Hi"), Options(3)).result(10)
    assert len(fresh.images) == 0


def test_close_ends_what_is_under_way_and_leaves_no_thread(fresh: VLM) -> None:
    engine = fresh.engine
    scheduler = Scheduler(engine, max_rows=1)
    pending = [scheduler.submit(engine.prepare(None, "Hi"), Options(900, stop_tokens=())) for _ in range(3)]
    next(iter(pending[0]))
    scheduler.close()
    scheduler.close()
    for each in pending:
        with pytest.raises(CancelledError, match="closed"):
            each.result(0)
    assert not any(thread.name == "fastvlm-scheduler" for thread in threading.enumerate())
    with pytest.raises(FastVLMError, match="closed"):
        scheduler.submit(engine.prepare(None, "Hi"), Options(1))
    with pytest.raises(OptionError, match="`max_rows` is 0, expected a whole number of at least 1"):
        Scheduler(engine, max_rows=0)
    with pytest.raises(OptionError, match="`pool_bytes` is -1, expected a whole number"):
        Scheduler(engine, pool_bytes=-1)


def test_what_cannot_be_answered_is_refused_before_it_waits(fresh: VLM) -> None:
    engine = fresh.engine
    with Scheduler(engine) as scheduler:
        for tokens in (engine.context, engine.context + 1):
            with pytest.raises(PromptError, match=rf"takes {tokens} tokens.* has room for {engine.context}; shorten"):
                scheduler.submit(Request([], [[1] * tokens], 0.0), Options(1))
        nothing: list[list[Piece]] = [[], [[]]]
        for pieces in nothing:
            with pytest.raises(PromptError, match="holds no positions, expected at least one"):
                scheduler.submit(Request([], pieces, 0.0), Options(1))
        assert (scheduler.load.queued, scheduler.load.rows) == (0, 0)
        last = scheduler.submit(Request([], [[1] * (engine.context - 1)], 0.0), Options(9, stop_tokens=())).result(60)
        assert len(last.token_ids) == 1


def test_an_answer_is_iterated_over_once_and_then_ends_at_once(fresh: VLM) -> None:
    engine = fresh.engine
    request = engine.prepare(None, "Hi")
    with Scheduler(engine) as scheduler:
        whole = scheduler.submit(request, Options(6, stop_tokens=()))
        chunks = list(whole)
        assert "".join(chunk.text for chunk in chunks) == whole.result().text and chunks[-1].answer is whole.result()
        assert list(whole) == []
        halves = scheduler.submit(request, Options(6, stop_tokens=()))
        first = next(iter(halves))  # left standing; another goes on behind it
        assert first.text + "".join(chunk.text for chunk in halves) == halves.result().text
        broken = scheduler.submit(request, Options(900, stop_tokens=()))
        next(iter(broken))
        broken.cancel()
        for _ in range(3):
            with pytest.raises(CancelledError, match="cancelled"):
                list(broken)


@pytest.mark.parametrize("listened", [False, True])
def test_what_nobody_reads_does_not_pile_up(fresh: VLM, listened: bool) -> None:
    """Where an answer is waited for, or listened to; whoever reads late gets all of it in fewer pieces."""
    options = Options(400, 1.0, seed=1, stop_tokens=(), logprobs=0)
    heard: list[Any] = []
    with Scheduler(fresh.engine) as scheduler:
        pending = scheduler.submit(
            fresh.engine.prepare(None, "Hi"), options, listener=heard.append if listened else None
        )
        answer = pending.result(60)
        chunks = list(pending)
    assert len(chunks) <= MAX_UNREAD_CHUNKS and (len(heard) > MAX_UNREAD_CHUNKS) == listened
    assert "".join(chunk.text for chunk in chunks) == answer.text and chunks[-1].answer is answer
    assert tuple(token for chunk in chunks for token in chunk.logprobs) == answer.logprobs
    assert list(pending) == []


def test_waiting_for_an_answer_has_an_end(fresh: VLM) -> None:
    with Scheduler(fresh.engine) as scheduler:
        pending = scheduler.submit(fresh.engine.prepare(None, "Hi"), Options(900, stop_tokens=()))
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            pending.result(0.01)
        assert not pending.done


# ---- what is shared ------------------------------------------------------------------------------


def test_a_conversation_that_is_sent_back_goes_on_where_it_was(fresh: VLM) -> None:
    engine = fresh.engine
    with Scheduler(engine) as scheduler:

        def ask(turns: list[Turn], salt: bytes = b"") -> Answer:
            pixels = [engine.pixels(PICTURES[0])]
            return scheduler.submit(
                Request(pixels, engine.render(turns), 0.0), Options(6, 1.0, seed=3), salt=salt
            ).result(10)

        first = ask([Turn("What is it?", 1)])
        ids = scheduler.ids_of(first.text)
        assert list(ids) == first.token_ids[: len(ids)] and len(first.token_ids) - len(ids) <= 1
        turns = [Turn("What is it?", 1, ids), Turn("And why?")]
        before = sum(map(len, engine.render([Turn("What is it?", 1)])))
        second = ask(turns)
        assert second.stats.reused_tokens >= before + len(first.token_ids) - 1
        assert scheduler.ids_of("never said") == tuple(engine.tokenizer.encode("never said"))
        assert scheduler.ids_of(first.text, salt=b"other") == tuple(engine.tokenizer.encode(first.text))
        other = ask(turns, b"other")
        assert (other.stats.reused_tokens, other.token_ids) == (0, second.token_ids)
        assert len(fresh.images) == 2  # nor does one key's picture tell another's that it was seen


def test_what_stood_behind_a_stop_string_is_not_put_into_a_conversation(fresh: VLM) -> None:
    """Nobody was shown it: the ids of the answer's text are those that spell it and no more."""
    engine = fresh.engine
    with Scheduler(engine) as scheduler:
        request = engine.prepare(None, "Hi")
        whole = scheduler.submit(request, Options(20, stop_tokens=())).result(10)
        stop = whole.text[6:9]
        first = scheduler.submit(request, Options(20, stop_tokens=(), stop=stop)).result(10)
        assert first.text == whole.text[: whole.text.index(stop)]
        assert scheduler.ids_of(first.text) == tuple(engine.tokenizer.encode(first.text))
        assert scheduler.ids_of(whole.text) == tuple(whole.token_ids)


def test_exact_takes_over_whole_pieces_of_a_prompt_alone(fresh: VLM) -> None:
    """Pieces of 512 positions, without the last one of the prompt; the signs that end a question differ in place."""
    with Scheduler(fresh.engine, exact=True, max_rows=1) as scheduler:
        for length, reused in [(512, 0), (512, 0), (513, 0), (513, 512), (600, 0), (900, 512)]:
            answer = scheduler.submit(words(fresh.engine, length), Options(1)).result(20)
            assert answer.stats.reused_tokens == reused


def test_a_fork_that_was_never_written_to_is_not_kept(fresh: VLM) -> None:
    """It would hold the buffers of a whole answer, and be counted as the beginning it shares."""
    engine = fresh.engine
    rows = Rows(engine)
    found: list[Any] = []
    rows.add(row_of(engine, (words(engine, 700), Options(300, stop_tokens=())), found))
    for _ in range(3):
        rows.turn()
    before = held()
    pictures = engine.prepare([PICTURES[0], PICTURES[1]], "Hi")  # forks the beginning they share, and is at a picture
    ended: list[Any] = []
    shares = row_of(engine, (pictures, Options(3)), ended)
    rows.add(shares)
    rows.turn()
    assert shares.entry is not None and shares.entry.prefix.is_view and rows.pool.hits == 1
    shares.cancelled = True
    del shares
    rows.turn()
    assert isinstance(ended[-1], CancelledError) and (len(rows.pool), rows.pool.nbytes) == (0, 0)
    ended.clear()
    assert held() == before
    rows.close(FastVLMError("over"))


def test_what_a_fork_has_written_is_kept(fresh: VLM) -> None:
    engine = fresh.engine
    rows = Rows(engine)
    found: list[Any] = []
    rows.add(row_of(engine, (words(engine, 700), Options(300, stop_tokens=())), found))
    rows.turn()
    rows.add(row_of(engine, (words(engine, 40, "1"), Options(2, stop_tokens=())), found))
    while len(rows.pool) == 0:
        rows.turn()
    assert rows.pool.hits == 1 and 0 < rows.pool.nbytes < rows.decoding[0].entry.prefix.nbytes  # type: ignore[union-attr]
    rows.close(FastVLMError("over"))


def test_the_pool_is_bounded_and_the_one_unused_for_longest_goes_first(fresh: VLM) -> None:
    engine = fresh.engine
    requests = [engine.prepare(None, word * 30) for word in ("abc", "def", "ghi")]
    with Scheduler(engine) as scheduler:
        scheduler.submit(requests[0], Options(2)).result(10)
        one = scheduler.load.pool_bytes
    with Scheduler(engine, pool_bytes=2 * one) as scheduler:

        def reused(request: Request) -> int:
            return scheduler.submit(request, Options(2)).result(10).stats.reused_tokens

        start = reused(requests[1])
        assert start == 0
        system = reused(requests[0])
        assert 0 < reused(requests[2]) == system < requests[0].prompt_tokens - 1
        assert reused(requests[0]) == requests[0].prompt_tokens - 1
        assert reused(requests[1]) == system  # which went when the third came
        assert scheduler.load.pool_bytes <= 2 * one and scheduler.load.pool_misses == 1


def test_one_in_use_is_forked_and_both_go_on_rightly(fresh: VLM) -> None:
    engine = fresh.engine
    asked = [
        (engine.prepare(PICTURES[0], "What is it?"), Options(30, t, seed=1, stop_tokens=())) for t in (0, 1.0, 2.0)
    ]
    expected = [said(alone(engine, each)) for each in asked]
    found: list[list[Any]] = [[] for _ in asked]
    rows = Rows(engine)
    for each, results in zip(asked, found, strict=True):
        rows.add(row_of(engine, each, results))
        rows.turn()
    while rows.busy:
        rows.turn()
    answers = [results[-1].answer for results in found]
    assert [said(answer) for answer in answers] == expected
    assert [answer.stats.reused_tokens for answer in answers] == [0, *[asked[0][0].prompt_tokens - 1] * 2]
