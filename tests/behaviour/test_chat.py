"""Conversations: the answer with reuse is the answer from scratch, and a follow-up computes its own tokens only."""

import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import VLM, FastVLMError, load
from fastvlm_mlx.chat.conversation import Chat
from fastvlm_mlx.chat.transcript import LeftOut, Transcript, pictures_in
from fastvlm_mlx.decoding import generate
from fastvlm_mlx.decoding.image_cache import ImageCache
from fastvlm_mlx.decoding.request import Options, Request
from fastvlm_mlx.errors import BusyError, CheckpointError, ImageError, OptionError, OutputError, PromptError
from fastvlm_mlx.inputs.image import Source
from fastvlm_mlx.inputs.prompt import Turn

PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in range(4)]
WORDS = ["What is it?", "And now?", "图里有什么？", "Describe\nthe image.", "Which colour?", ""]


def from_scratch(vlm: VLM, chat: Chat, prompt: str, pictures: list[np.ndarray], max_tokens: int) -> list[int]:
    """The ids of the next answer with nothing reused, from the conversation as it stands."""
    gone = chat.left_out
    shown = [picture.pixels for exchange in chat.exchanges for picture in exchange.pictures][gone.pictures :]
    carried = pictures_in(chat.exchanges[: gone.exchanges]) - gone.pictures
    turns = [*(exchange.turn for exchange in chat.exchanges[gone.exchanges :]), Turn(prompt, len(pictures))]
    turns[0] = Turn(turns[0].prompt, turns[0].images + carried, turns[0].answer)
    pieces = vlm.engine.render(turns, chat.system)
    request = Request([*shown, *(vlm.engine.pixels(picture) for picture in pictures)], pieces, 0.0)
    vlm.images.clear()
    return next(
        chunk.answer for chunk in generate.stream(vlm.engine, request, Options(max_tokens)) if chunk.answer is not None
    ).token_ids


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_random_conversations(small: VLM, tmp_path: Path, seed: int) -> None:
    """Text, one or several images, an image added later, turns undone or edited, the system prompt changed, answers cut
    short, the beginning left out, a transcript taken up.
    """
    rng = random.Random(seed)
    chat = small.chat(system=rng.choice([None, "Be brief."]))
    for _ in range(8):
        action = rng.random()
        if action < 0.15 and chat.messages:
            chat.system = rng.choice([None, "Be brief.", "You are a pirate."])
        elif action < 0.3 and chat.exchanges:
            for _ in range(rng.randint(1, len(chat.exchanges))):
                chat.undo()
        elif action < 0.4:
            for chunk in chat.stream(rng.choice(WORDS), rng.choice(PICTURES), max_tokens=9):
                if chunk.text and rng.random() < 0.5:
                    break
        elif action < 0.5 and chat.exchanges:
            words = {key: rng.choice(WORDS) for key in ("prompt", "answer") if rng.random() < 0.6}
            chat.edit(rng.randrange(len(chat.exchanges)), **words)
        elif action < 0.6 and chat.exchanges:
            gone = rng.randint(0, len(chat.exchanges))
            chat.leave_out(LeftOut(gone, rng.randint(0, pictures_in(chat.exchanges[:gone]))))
        elif action < 0.65:
            chat.save(tmp_path / "chat.json")
            chat.load(tmp_path / "chat.json")
        prompt, length = rng.choice(WORDS), rng.randint(1, 12)
        pictures = rng.sample(PICTURES, rng.choice([0, 0, 1, 1, 2]))
        expected = from_scratch(small, chat, prompt, pictures, length)
        assert chat.ask(prompt, pictures, max_tokens=length).token_ids == expected


def test_a_stream_left_standing_does_not_disturb_what_comes_after(small: VLM) -> None:
    """As in a notebook, where an interrupted loop keeps its stream until much later."""
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    left = chat.stream("And now?", max_tokens=30)
    while not next(left).text:
        pass
    expected = from_scratch(small, chat, "Which colour?", [], 6)
    assert chat.ask("Which colour?", max_tokens=6).token_ids == expected
    with pytest.raises(PromptError, match="Another question"):
        list(left)
    left.close()
    chat.undo()
    expected = from_scratch(small, chat, "And now?", PICTURES[1:2], 6)
    assert chat.ask("And now?", PICTURES[1], max_tokens=6).token_ids == expected
    assert len(chat.messages) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupted as it is closed
def test_interrupted_anywhere_the_conversation_stays_true_to_its_caches(small: VLM) -> None:
    """An interrupt as any function of the package is entered or left; then another question gets the answer it gets
    anyway."""
    package = str(Path(generate.__file__).parents[1])
    rng = random.Random(0)
    events = moment = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal events
        if event in ("call", "return") and frame.f_code.co_filename.startswith(package):
            events += 1
            if events == moment:
                raise KeyboardInterrupt

    def ask(chat: Chat) -> None:
        sys.setprofile(count)
        try:
            chat.ask("And now?", PICTURES[1], max_tokens=4)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)

    def begun() -> Chat:
        chat = small.chat()
        chat.ask("What is it?", PICTURES[0], max_tokens=3)
        return chat

    chat = begun()
    expected = from_scratch(small, chat, "Which colour?", [], 4)
    ask(chat)
    total, places = events, set()
    assert total > 200
    for moment in [*range(1, total, 41), *(rng.randrange(total) for _ in range(10)), *range(total - 6, total)]:
        small.images.clear()
        chat, events = begun(), 0
        ask(chat)
        while len(chat.exchanges) > 1:  # interrupted after it was complete
            chat.undo()
        places.add(events)
        assert chat.ask("Which colour?", max_tokens=4).token_ids == expected, moment
    assert len(places) > 15


def test_a_follow_up_costs_its_own_tokens_only(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = small.chat()
    first = chat.ask("What is it?", PICTURES[0], max_tokens=10)
    assert first.stats.reused_tokens == 0
    encoded, prefilled = [], []
    encode, prefill = small.model.encode, small.model.prefill
    monkeypatch.setattr(small.model, "encode", lambda pixels: encoded.append(1) or encode(pixels))
    monkeypatch.setattr(small.model, "prefill", lambda x, cache: prefilled.append(x.shape[1]) or prefill(x, cache))
    second = chat.ask("And now?", max_tokens=10)
    # cut short after ten tokens, so the tenth was never fed back: it, the end of its turn, and the question
    own = (
        len(small.tokenizer.encode("\n"))
        + len(small.tokenizer.encode("user\nAnd now?"))
        + len(small.tokenizer.encode("\n"))
    )
    own += 1 + 1 + 1 + 1 + 1 + len(small.tokenizer.encode("assistant\n"))
    assert prefilled == [own] and encoded == []
    assert second.stats.reused_tokens == second.stats.prompt_tokens - own


def test_the_answers_ids_are_kept_as_they_were_generated(small: VLM) -> None:
    chat = small.chat()
    answer = chat.ask("What is it?", PICTURES[0], max_tokens=15)
    pieces = small.engine.render([chat.exchanges[0].turn])
    last = pieces[-1]
    assert isinstance(last, list)
    end = [small.tokenizer.special("<|im_end|>"), *small.tokenizer.encode("\n")]
    assert last[-15 - len(end) :] == [*answer.token_ids, *end]


def test_pictures_are_known_by_content(small: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    small.images.clear()
    small.generate(str(path), max_tokens=1)
    encoded: list[int] = []
    encode = small.model.encode
    monkeypatch.setattr(small.model, "encode", lambda pixels: encoded.append(1) or encode(pixels))
    small.generate(PICTURES[0], "Another question?", max_tokens=1)
    assert encoded == [] and len(small.images) == 1
    Image.fromarray(PICTURES[1]).save(path)  # another picture under the same path
    small.generate(str(path), max_tokens=1)
    assert encoded == [1] and len(small.images) == 2


def test_the_image_cache_is_bounded() -> None:
    cache = ImageCache(capacity=1000)
    for i in range(10):
        cache.put(bytes([i]), mx.zeros((100,), dtype=mx.float32))
    assert len(cache) == 2 and cache.nbytes == 800
    assert cache.get(bytes([9])) is not None and cache.get(bytes([0])) is None
    assert cache.get(bytes([8])) is not None
    cache.put(b"new", mx.zeros((100,), dtype=mx.float32))
    assert cache.get(bytes([8])) is not None and cache.get(bytes([9])) is None  # the one unused for longest went
    cache.put(b"huge", mx.zeros((1000,), dtype=mx.float32))
    assert cache.get(b"huge") is None


def test_messages_and_undo(small: VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    chat = small.chat(system="Be brief.")
    answer = chat.ask("What is it?", str(path), max_tokens=4)
    chat.ask("And now?", PICTURES[1], max_tokens=4)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[1] == {"role": "user", "content": "What is it?", "images": [str(path)]}
    assert chat.messages[2]["content"] == answer.text and chat.messages[3]["images"] == [None]
    assert chat.undo().prompt == "And now?"
    assert len(chat.messages) == 3 and chat.nbytes > 0
    chat.clear()
    assert chat.nbytes == 0
    with pytest.raises(PromptError, match="nothing to undo"):
        chat.undo()


def test_saved_and_reopened(small: VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    chat = small.chat(system="Be brief.")
    pictures: list[Source] = [str(path), PICTURES[1]]
    chat.ask("What is it?", pictures, max_tokens=6)
    chat.ask("And now?", max_tokens=6)
    chat.save(tmp_path / "chat.json")
    again = small.chat()
    with pytest.raises(ImageError, match="more than the 2,399 allowed"):
        again.load(tmp_path / "chat.json", max_pixels=2399)
    again.load(tmp_path / "chat.json", max_pixels=2400)  # as large as the file, smaller than what lies inside
    assert again.messages == chat.messages
    assert again.ask("Why?", max_tokens=8).token_ids == chat.ask("Why?", max_tokens=8).token_ids
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat.json", "picture.png"]


def test_saving_leaves_other_files_alone(small: VLM, tmp_path: Path) -> None:
    other, link, target = tmp_path / "chat.json.partial", tmp_path / "chat.json", tmp_path / "kept.json"
    other.write_text("mine")
    link.symlink_to(target)
    name = b"\xe9.png" if sys.platform == "linux" else b"e.png"  # elsewhere names are UTF-8
    picture = os.fsdecode(os.fsencode(tmp_path / "x")[:-1] + name)
    Image.fromarray(PICTURES[0]).save(picture)
    chat = small.chat()
    chat.ask("What is it?", picture, max_tokens=4)
    chat.save(link)
    assert other.read_text() == "mine" and link.is_symlink() and target.is_file()
    assert small.chat().load(link).messages == chat.messages
    for wrong in (None, 5):
        with pytest.raises(OptionError, match="`path` is"):
            chat.save(wrong)  # type: ignore[arg-type]


def test_a_conversation_is_taken_up_in_one_line(small: VLM, tmp_path: Path) -> None:
    chat = small.chat(system="Be brief.")
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    chat.save(tmp_path / "talk.json")
    again = small.chat().load(tmp_path / "talk.json")
    assert isinstance(again, Chat) and again.messages == chat.messages and again.system == "Be brief."
    assert again.ask("And now?", max_tokens=4).token_ids == chat.ask("And now?", max_tokens=4).token_ids


def test_what_is_wrong_with_a_transcript_is_said_and_changes_nothing(small: VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    chat = small.chat()
    chat.ask("What is it?", str(path), max_tokens=3)
    chat.save(tmp_path / "chat.json")
    before, good = chat.messages, json.loads((tmp_path / "chat.json").read_text())

    def broken(text: str, says: str, error: type[FastVLMError] = CheckpointError) -> None:
        (tmp_path / "chat.json").write_text(text)
        with pytest.raises(error, match=says):
            chat.load(tmp_path / "chat.json")
        assert chat.messages == before

    broken("", "not a transcript")
    broken("[]", "damaged|not a transcript")
    broken("{}", "damaged|not a transcript")
    broken(json.dumps(good | {"version": 99}), "not a transcript of this version")
    broken(json.dumps(good | {"resolution": 256}), "resolution=256")
    broken(json.dumps(good | {"system": 7}), "damaged|not a transcript")
    broken(json.dumps(good | {"exchanges": [{}]}), "damaged|not a transcript")
    broken(json.dumps(good | {"exchanges": [good["exchanges"][0] | {"answer_ids": [1 << 40]}]}), "another model")
    Image.fromarray(PICTURES[1]).save(path)
    broken(json.dumps(good), "no longer the picture")
    path.unlink()
    broken(json.dumps(good), "no such image", ImageError)
    with pytest.raises(CheckpointError, match="no such transcript"):
        chat.load(tmp_path / "nowhere.json")
    with pytest.raises(OutputError, match="cannot be written"):
        chat.save(tmp_path / "no" / "such" / "folder.json")


@pytest.mark.slow
def test_too_long_a_question_leaves_the_conversation_as_it_was(small: VLM) -> None:
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=3)
    before = chat.messages
    with pytest.raises(PromptError, match="has room for"):
        chat.ask("word " * 40_000)
    with pytest.raises(ImageError):
        chat.ask("And this?", "no-such-picture.png")
    assert chat.messages == before
    expected = from_scratch(small, chat, "And now?", [], 5)
    assert chat.ask("And now?", max_tokens=5).token_ids == expected


def test_what_comes_before_a_change_is_kept_and_only_that(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward positions, counted: an edit costs what follows it, and each answer what the caches do not hold."""
    counted = []
    run = type(small.model.text).__call__
    monkeypatch.setattr(
        type(small.model.text), "__call__", lambda self, x, cache: counted.append(x.shape[1]) or run(self, x, cache)
    )
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=5)
    whole = chat.ask("And now?", max_tokens=5).stats.prompt_tokens
    third = chat.ask("Why?", max_tokens=5)
    chat.undo()
    counted.clear()
    assert chat.ask("Why?", max_tokens=5).token_ids == third.token_ids
    assert counted == [1] * 5  # the last position, whose logits are needed, then four tokens: nothing else
    chat.undo()
    chat.edit(1, prompt="And then?")
    counted.clear()
    edited = chat.ask("Why?", max_tokens=5)
    first = small.engine.render([chat.exchanges[0].turn])
    before = sum(map(len, first)) + 1 + len(small.tokenizer.encode("user\nAnd"))
    assert counted[0] == edited.stats.prompt_tokens - before and edited.stats.reused_tokens == before
    chat.system = "Be brief."
    counted.clear()
    assert chat.ask("Why?", max_tokens=1).stats.reused_tokens < whole // 2 and sum(counted) > whole


def test_an_edited_conversation(small: VLM) -> None:
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=5)
    chat.ask("And now?", max_tokens=5)
    chat.edit(0, answer="A red circle.")
    chat.edit(-1, prompt="Which colour?")
    assert [message["content"] for message in chat.messages][:3] == ["What is it?", "A red circle.", "Which colour?"]
    assert small.tokenizer.decode(chat.exchanges[0].answer_ids) == "A red circle."
    for number in (2, -3):
        with pytest.raises(PromptError, match="There is no question"):
            chat.edit(number, prompt="")
    with pytest.raises(PromptError, match="NUL"):
        chat.edit(0, answer="\0")


def in_a_thread(work: Iterator[object]) -> BaseException | None:
    """What doing some work in another thread raised."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            for _ in work:
                pass
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_another_thread_is_refused_while_an_answer_is_read(small: VLM, tmp_path: Path) -> None:
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    expected = from_scratch(small, chat, "And now?", [], 20)
    answering = chat.stream("And now?", max_tokens=20)
    while not next(answering).text:
        pass

    def changes() -> Iterator[None]:
        for change in (chat.undo, chat.clear, lambda: setattr(chat, "system", "x"), lambda: chat.edit(0, prompt="x")):
            with pytest.raises(BusyError, match="in another thread; wait for that answer"):
                change()
            yield

    assert isinstance(in_a_thread(chat.stream("Why?", max_tokens=2)), BusyError)
    assert in_a_thread(changes()) is None
    assert [chunk.answer for chunk in answering][-1].token_ids == expected  # type: ignore[union-attr]
    assert in_a_thread(chat.stream("Why?", max_tokens=2)) is None  # it has ended
    assert [exchange.prompt for exchange in chat.exchanges] == ["What is it?", "And now?", "Why?"]


def test_nothing_is_reused_of_weights_that_were_loaded_before(apple: Path) -> None:
    vlm = load(apple)
    chat = vlm.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    vlm.engine.load_weights(bits=2, group_size=32)
    expected = from_scratch(vlm, chat, "And now?", [], 8)
    answer = chat.ask("And now?", max_tokens=8)
    assert (answer.token_ids, answer.stats.reused_tokens) == (expected, 0)
    assert chat.ask("Why?", max_tokens=2).stats.reused_tokens > 0


def test_an_answer_may_be_read_on_in_another_thread(small: VLM) -> None:
    """As web servers do: each chunk is asked for by whichever thread of a pool is free."""
    chat = small.chat()
    expected = from_scratch(small, chat, "What is it?", [], 6)
    answering = chat.stream("What is it?", max_tokens=6)
    next(answering)
    assert in_a_thread(answering) is None
    assert [list(exchange.answer_ids) for exchange in chat.exchanges] == [expected]
    assert chat.ask("And now?", max_tokens=3).token_ids


def test_many_threads_ask_at_once_and_each_answer_is_right_or_refused(small: VLM) -> None:
    chat = small.chat()
    refused = []

    def ask() -> None:
        for _ in range(6):
            try:
                chat.ask("What is it?", PICTURES[0], max_tokens=3)
            except (BusyError, PromptError) as error:
                refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) + len(chat.exchanges) == 24 and chat.exchanges
    expected = from_scratch(small, chat, "And now?", [], 5)
    assert chat.ask("And now?", max_tokens=5).token_ids == expected


def test_a_thread_that_ended_amid_an_answer_holds_nobody_up(small: VLM) -> None:
    chat = small.chat()
    left = chat.stream("What is it?", max_tokens=9)
    thread = threading.Thread(target=lambda: next(left))
    thread.start()
    thread.join()
    assert chat.ask("And now?", max_tokens=3).token_ids
    with pytest.raises(PromptError, match="Another question"):
        list(left)


@pytest.mark.parametrize("change", [Chat.undo, Chat.clear, lambda chat: setattr(chat, "system", "Be brief.")])
def test_a_change_amid_an_answer_ends_it(small: VLM, change: object) -> None:
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    for begun in (True, False):
        answering = chat.stream("And now?", max_tokens=20)
        if begun:
            next(answering)
        change(chat)  # type: ignore[operator]
        with pytest.raises(PromptError, match="the conversation was changed"):
            list(answering)
        expected = from_scratch(small, chat, "Why?", [], 5)
        assert chat.ask("Why?", max_tokens=5).token_ids == expected


@pytest.mark.slow
def test_a_full_context_is_cleared_from_the_oldest_words_on_and_keeps_its_pictures(small: VLM) -> None:
    chat = small.chat(system="Be brief.")
    chat.ask("What is it? " * 8, PICTURES[0], max_tokens=4)
    for _ in range(40):
        question = "What is on the table? " * 6
        cut = chat.crowded_out(question, max_tokens=30)
        if cut != chat.left_out:
            break
        chat.ask(question, max_tokens=4)
    assert 0 < cut.exchanges < len(chat.exchanges) and cut.pictures == 0
    length = chat.tokens
    chat.leave_out(cut)
    assert chat.tokens < length and chat.left_out.pictures == 0
    expected = from_scratch(small, chat, question, [], 6)
    answer = chat.ask(question, max_tokens=6)
    assert answer.token_ids == expected
    assert answer.stats.images == 1  # the picture is still seen, and was not computed again
    assert answer.stats.reused_tokens >= len(small.tokenizer.encode("system\nBe brief.")) + small.engine.image_tokens
    assert answer.stats.prompt_tokens < chat.context * 0.8
    assert len(chat.messages) == 1 + 2 * len(chat.exchanges)  # nothing is missing from the transcript


def test_asking_on_a_full_context_leaves_the_oldest_words_out_and_says_so(small: VLM) -> None:
    chat = small.chat(system="Be brief.")
    assert chat.ask("What is it? " * 8, PICTURES[0], max_tokens=4).left_out == ""
    question = "What is on the table? " * 6
    for _ in range(40):
        cut = chat.crowded_out(question, max_tokens=4)
        if cut != chat.left_out:
            break
        answer = chat.ask(question, max_tokens=4)
        assert answer.left_out == "" and "left_out" not in json.loads(answer.to_json())
    assert cut.exchanges > 1
    chunks = chat.stream(question, max_tokens=4)
    next(chunks)
    chunks.close()
    assert chat.left_out == LeftOut()  # a question that got no answer took nothing away

    other = small.chat(system="Be brief.")  # as the command does it: in two steps
    other.take_up(Transcript("Be brief.", chat.exchanges, chat.left_out))
    other.leave_out(cut)
    expected = from_scratch(small, other, question, [], 4)
    answer = chat.ask(question, max_tokens=4)
    assert answer.token_ids == expected
    assert chat.left_out == cut and answer.stats.images == 1
    assert answer.left_out == f"the oldest {cut.exchanges} questions with their answers"
    assert json.loads(answer.to_json(model="m"))["left_out"] == answer.left_out
    assert chat.ask("And?", max_tokens=4).left_out == ""

    chat.undo()
    chat.undo()
    assert chat.left_out == LeftOut()  # what the question had pushed out is seen again
    chat.leave_out(LeftOut(len(chat.exchanges), 0))
    assert chat.tokens > small.engine.image_tokens  # the picture that is still seen is counted
    assert chat.tokens < chat.context


def test_what_is_left_out_in_words() -> None:
    before = LeftOut(2, 1)
    assert before.beyond(before) == LeftOut().beyond(before) == ""
    assert LeftOut(3, 1).beyond(before) == "the oldest question with its answer"
    assert LeftOut(4, 2).beyond(before) == "the oldest 2 questions with their answers and the oldest picture"
    assert LeftOut(2, 4).beyond(before) == "the oldest 3 pictures"


def test_more_pictures_than_fit_leave_the_latest(small: VLM) -> None:
    chat = small.chat()
    shown = [PICTURES[number % 4] for number in range(40)]
    for _ in range(8):
        cut = chat.crowded_out("And these?", len(shown), max_tokens=4)
        chat.leave_out(cut)
        chat.ask("And these?", shown, max_tokens=4)
    assert 0 < chat.left_out.pictures <= 40 * chat.left_out.exchanges
    with pytest.raises(PromptError, match="show fewer images"):
        chat.crowded_out("And these?", 300)


@pytest.mark.slow
def test_a_question_too_long_by_itself_leaves_nothing_out(small: VLM) -> None:
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=3)
    with pytest.raises(PromptError, match="has room for"):
        chat.crowded_out("word " * 40_000)
    assert chat.left_out == LeftOut()


def test_the_same_seed_draws_the_same_conversation(small: VLM) -> None:
    def talk(seed: int) -> list[str]:
        chat = small.chat()
        for prompt in ("What is it?", "And now?"):
            chat.ask(prompt, PICTURES[0], max_tokens=12, temperature=1.0, top_p=0.95, seed=seed)
        return [message["content"] for message in chat.messages]

    assert talk(3) == talk(3) != talk(4)


@pytest.mark.slow
def test_corrupt_transcripts(small: VLM, tmp_path: Path) -> None:
    """Hundreds of damages, of bytes and of values: each is refused with a sentence, or is none; the conversation goes
    on."""
    rng = random.Random(0)
    path = tmp_path / "chat.json"
    chat = small.chat(system="Be brief.")
    chat.ask("What is it?", PICTURES[0], max_tokens=3)
    chat.ask("And now?", max_tokens=3)
    chat.save(path)
    good, refused = path.read_bytes(), 0
    before, ids = chat.messages, chat.ask("Why?", max_tokens=4).token_ids
    chat.undo()
    values: list[object] = [None, True, -1, 1.5, 1 << 70, "", "\ud800", "\0", [], [[]], {}, "x" * 100]
    for _ in range(400):
        if rng.random() < 0.5:
            data = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(data))
                kind = rng.random()
                if kind < 0.4:
                    data[place] = rng.randrange(256)
                elif kind < 0.7:
                    del data[place : place + rng.randint(1, 50)]
                else:
                    del data[place:]
                    break
            path.write_bytes(data)
        else:
            tree = json.loads(good)
            node, key = rng.choice(list(_places(tree)))
            if rng.random() < 0.3:
                del node[key]
            else:
                node[key] = rng.choice(values)
            path.write_text(json.dumps(tree))
        try:
            chat.load(path)
        except FastVLMError as error:
            refused += 1
            assert str(error).endswith(".") and len(str(error)) < 1000
            assert chat.messages == before
        else:
            chat.ask("Why?", max_tokens=1)  # harmless, such as another word in a question
            path.write_bytes(good)
            chat.load(path)
    assert refused > 300
    assert chat.ask("Why?", max_tokens=4).token_ids == ids


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in a JSON tree, as its container and key."""
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _places(value)


@pytest.mark.slow
def test_the_benchmark_of_follow_ups(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and starts both from the same caches (which it checks itself); what it prints is for people to judge."""
    from benchmarks import followup

    followup.main(
        [
            "--random",
            "small",
            "--resolution",
            "64",
            "--questions",
            "2",
            "--rounds",
            "1",
            "--answer-tokens",
            "4",
            "--json",
        ]
    )
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["held_tokens"] > result["own_tokens"] > 0 and result["ratio"] > 0
