"""A conversation typed line by line: each line asks a question, or is a command that changes the conversation.

Lines come from a front (the terminal, or a pipe) and answers go back to it. An error about a line is one sentence, and
the conversation goes on as it was.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...chat.conversation import Chat
from ...chat.transcript import FORMAT, LeftOut, Picture, pictures_in
from ...decoding.answer import Answer
from ...decoding.engine import Engine
from ...decoding.request import Options
from ...errors import FastVLMError, ImageError, OptionError, OutOfMemoryError, OutputError, PromptError
from ...files.regular import size_of
from ...inputs.prompt import SYSTEM
from .. import process
from . import typed
from .front import Front

MAX_QUOTED_CHARS = 60  # characters of a question in a note
FREES = "/clear frees the memory of this conversation"


@dataclass(frozen=True)
class Question:
    """A question and the pictures asked about."""

    prompt: str
    pictures: tuple[Picture, ...]


class Session:
    """A typed conversation: what `Chat` keeps, the pictures that wait for a question, and what /retry asks again."""

    def __init__(self, engine: Engine, chat: Chat, front: Front, options: Options, max_pixels: int):
        self.engine, self.chat = engine, chat
        self.waiting: list[Picture] = []
        self._front, self._options, self._max_pixels = front, options, max_pixels
        self._stopped: Question | None = None  # the last question, if it was not answered
        self._tries = 0  # number of times the last question was retried
        self._answer: Answer | None = None
        self._file: Path | None = None

    def run(self) -> None:
        """Handle lines until they end or one says to quit."""
        for line in self._front.lines(lambda: self.status):
            try:
                if not self.take(line):
                    return
            except KeyboardInterrupt:
                if not self._front.typing:
                    raise
                process.take()
                self._front.note("Stopped.")

    def take(self, line: str) -> bool:
        """Handle one line; returns whether to go on."""
        try:
            said = typed.parse(line)
            if said.command in (None, "image"):
                typed.check_addresses(said.text)
            said = replace(said, text=self._front.full(said.text))
            if said.command == "quit":
                return False
            if said.command is not None:
                getattr(self, f"_{said.command}")(said)
            elif (meant := typed.BARE.get(said.text.lower())) is not None and self._front.typing and not said.pictures:
                self._front.note(f"Commands begin with a slash: /{meant}. To ask about the word, put it in quotes.")
            elif said.text or said.pictures:
                self._image(said)
        except OutOfMemoryError as error:
            self._front.complain(f"{str(error).rstrip('.')}; {FREES}.")
        except FastVLMError as error:
            self._front.complain(str(error))
        except (MemoryError, RuntimeError) as error:  # MLX, where memory runs out
            if not isinstance(error, MemoryError) and type(error) is not RuntimeError:
                raise
            self._front.complain(f"This could not be computed ({str(error)[:200] or 'out of memory'}); {FREES}.")
        return True

    @property
    def status(self) -> str:
        """The model, and how much of its context is used, as one line."""
        used, context = self.chat.tokens, self.chat.context
        waiting = f" · {_count(len(self.waiting), 'picture')} waiting" if self.waiting else ""
        name = self.engine.name.rstrip("/").rpartition("/")[2]
        return f"{name} · {used:,} of {context:,} tokens ({used / context:.0%}){waiting}"

    def show(self, *pictures: Picture) -> None:
        """Keep pictures for the next question."""
        self.waiting += pictures

    def ask(self, prompt: str, options: Options | None = None) -> None:
        """Ask a question about the waiting pictures.

        An answer that is interrupted leaves the conversation as it was.
        """
        options = options or self._options
        question = Question(prompt, tuple(self.waiting))
        self._note_of_what_goes(question, options)
        chunks = self.chat.stream(
            prompt, question.pictures, max_tokens=options.max_tokens, temperature=options.temperature,
            top_p=options.top_p, seed=options.seed, top_k=options.top_k, min_p=options.min_p,
            repetition_penalty=options.repetition_penalty, stop=options.stop,
        )  # fmt: skip
        self._stopped, said = question, len(self.chat.exchanges)
        try:
            self._answer = self._front.show(chunks)
        except BaseException as error:
            interrupted = process.take() or isinstance(error, KeyboardInterrupt)
            if not interrupted:
                raise
            if not self._front.typing:
                raise KeyboardInterrupt from error
            if len(self.chat.exchanges) > said:  # it was complete, but not printed to its end
                self.chat.undo()
            kept = f"; {_they(question.pictures)} for the next question" if question.pictures else ""
            self._front.note(f"Stopped, and not kept{kept}. /retry asks again.")
            return
        finally:
            chunks.close()
        self._stopped, self.waiting = None, []
        self._warn(question, options)

    def _note_of_what_goes(self, question: Question, options: Options) -> None:
        cut = self.chat.crowded_out(question.prompt, len(question.pictures), max_tokens=options.max_tokens)
        if cut != self.chat.left_out:
            self._front.note(f"The context is full: the model no longer sees {self._going(cut)}; {self._staying(cut)}.")

    def _warn(self, question: Question, options: Options) -> None:
        """Say in advance what another question of this length will push out of the context."""
        with suppress(PromptError):
            cut = self.chat.crowded_out(question.prompt, max_tokens=options.max_tokens)
            if cut != self.chat.left_out:
                used = f"{self.chat.tokens:,} of {self.chat.context:,} tokens"
                self._front.note(
                    f"The context is nearly full ({used}): from the next question on the model will no longer see "
                    f"{self._going(cut)}; {self._staying(cut)}."
                )

    def _going(self, cut: LeftOut) -> str:
        """What leaving out `cut` takes from the model, as a phrase."""
        before = self.chat.left_out
        questions, pictures = cut.exchanges - before.exchanges, cut.pictures - before.pictures
        parts = []
        if questions:
            first = _quoted(self.chat.exchanges[before.exchanges].prompt)
            answers = "their answers" if questions > 1 else "its answer"
            parts.append(f"the oldest {_count(questions, 'question')} with {answers} (from {first} on)")
        if pictures:
            parts.append(f"the oldest {_count(pictures, 'picture')}")
        return " and ".join(parts)

    def _staying(self, cut: LeftOut) -> str:
        """What leaving out `cut` keeps, as a phrase."""
        pictures = pictures_in(self.chat.exchanges) - cut.pictures
        seen = f", {_count(pictures, 'picture')}" if pictures else ""
        return f"the system prompt{seen} and the question stay"

    def _image(self, said: typed.Typed) -> None:
        """Handle pictures named in a line, and its question if it has one."""
        if not said.text and not said.pictures:
            raise ImageError("Name a picture: /image PATH; or drag it into the line.")
        pictures = [self.chat.look(path, max_pixels=self._max_pixels) for path in said.pictures]
        self.show(*pictures)
        if said.text:
            self._tries = 0
            self.ask(said.text)
        else:
            tokens = len(pictures) * self.engine.image_tokens
            self._front.note(f"{_count(len(pictures), 'picture')}, {tokens} tokens, for the next question.")

    def _paste(self, _: typed.Typed) -> None:
        from . import clipboard

        sources = clipboard.pictures()
        self.show(*(self.chat.look(source, max_pixels=self._max_pixels) for source in sources))
        self._front.note(f"{_count(len(sources), 'picture')} from the clipboard, for the next question.")

    def _undo(self, _: typed.Typed) -> None:
        if self.waiting:
            self._front.note(f"{_count(len(self.waiting), 'picture')} taken back.")
            self.waiting = []
            return
        last = self.chat.undo()
        self.waiting, self._stopped = list(last.pictures), None
        kept = f"; {_they(last.pictures)} for another question, or for another /undo" if last.pictures else ""
        self._front.note(f"{_quoted(last.prompt)} taken back{kept}.")

    def _retry(self, said: typed.Typed) -> None:
        options = self._options
        if said.text:
            try:
                options = replace(options, temperature=float(said.text))
            except ValueError as error:
                raise OptionError("/retry takes a temperature, such as /retry 0.7, or nothing.") from error
        if self._stopped is None:
            if not self.chat.exchanges:
                raise PromptError("There is nothing to retry: the conversation has not begun.")
            if options.temperature == 0:
                self._front.note("At temperature 0 an answer is always the same; /retry 0.7 draws another.")
            last = self.chat.undo()
            self._stopped = Question(last.prompt, last.pictures)
        question = self._stopped
        self._tries += 1
        if options.seed is not None:
            # Another answer, and the same one every time.
            options = replace(options, seed=(options.seed + self._tries) % (1 << 64))
        waiting = [picture for picture in self.waiting if picture not in question.pictures]
        self.waiting = list(question.pictures)
        try:
            self.ask(question.prompt, options)
        finally:
            self.waiting += waiting

    def _clear(self, _: typed.Typed) -> None:
        self.chat.clear()
        self.waiting, self._stopped, self._file = [], None, None
        self._front.note("The conversation starts over.")

    def _system(self, said: typed.Typed) -> None:
        if said.text:
            self.chat.system = None if said.text == "default" else said.text
        self._front.note(f"System prompt: {self.chat.system if self.chat.system is not None else SYSTEM}")

    def _save(self, said: typed.Typed) -> None:
        if not said.text and self._file is None:
            raise OutputError("Name a file: /save PATH.")
        path = Path(typed.path_of(said.text)) if said.text else self._file
        assert path is not None
        if path != self._file and os.path.exists(path) and not _is_transcript(path):  # noqa: PTH110  # Path.exists may raise
            raise OutputError(f"{path} exists and is not a saved conversation; choose another name.", path=path)
        self.chat.save(path)
        self._file = path
        self._front.note(f"{_count(len(self.chat.exchanges), 'question')} saved in {path}.")

    def _load(self, said: typed.Typed) -> None:
        if not said.text:
            raise PromptError("Name a saved conversation: /load PATH.")
        path = Path(typed.path_of(said.text))
        self.chat.load(path, max_pixels=self._max_pixels)
        self.waiting, self._stopped, self._file = [], None, path
        exchanges = self.chat.exchanges
        self._front.note(
            f"{_count(len(exchanges), 'question')} about {_count(pictures_in(exchanges), 'picture')} from {path}."
        )
        if exchanges:
            self._front.note(f"Last: {_quoted(exchanges[-1].prompt)} {_quoted(exchanges[-1].answer)}")

    def _stats(self, _: typed.Typed) -> None:
        lines = [self.status]
        if self._answer is not None:
            stats = self._answer.stats
            lines += [stats.describe(load_seconds=self.engine.load_seconds)]
            lines += [f"{stats.reused_tokens} of the {stats.prompt_tokens} tokens were there from before"]
        cache = self.engine.images
        lines += [f"pictures kept: {len(cache)}, {cache.nbytes / 1e6:.1f} of at most {cache.capacity / 1e6:.0f} MB"]
        lines += [f"conversation kept: {self.chat.nbytes / 1e6:.1f} MB"]
        self._front.note("\n".join(lines))

    def _help(self, _: typed.Typed) -> None:
        rows = [(f"/{name} {argument}".rstrip(), meaning) for name, (argument, meaning) in typed.COMMANDS.items()]
        width = max(len(command) for command, _ in rows)
        lines = [f"{command:<{width}}  {meaning}" for command, meaning in rows]
        lines.append("Anything else is a question; Ctrl-C stops its answer.")
        self._front.note("\n".join(lines))


def _is_transcript(path: Path) -> bool:
    """Whether a file begins as saved conversations do."""
    try:
        size_of(path)
        with path.open("rb") as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _they(pictures: tuple[Picture, ...]) -> str:
    return "its picture waits" if len(pictures) == 1 else "its pictures wait"


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line[:MAX_QUOTED_CHARS]}{'…' * (len(line) > MAX_QUOTED_CHARS)}”"
