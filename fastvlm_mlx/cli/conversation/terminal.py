"""The chat in a terminal: a line editor with history and completion, and answers rendered from Markdown.

prompt_toolkit and rich are imported here and nowhere else; this module is imported when a chat begins in a terminal.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    ThreadedCompleter,
    get_common_complete_suffix,
)
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys
from rich.console import Console

from ...decoding.answer import Answer, Chunk
from .. import process
from ..messages import printable
from . import typed
from .markdown import MarkdownWriter
from .plain import Plain

LONG_PASTE_CHARS = 1000  # a longer paste is abbreviated, or editing the line would be slow
PASTE = re.compile(r"\[pasted text \d+, [\d,]+ characters\]")
COMMAND = re.compile(r"/\w*")
PATH = re.compile(r"(?:\\.|[^\s\\])*$")  # the word before the cursor, spaces escaped
MAX_TYPED_CHARS = 60  # characters in one read
MAX_COMPLETIONS = 200  # completions of a path


class Terminal(Plain):
    """A `Front` for a terminal that can move its cursor; `markdown` says whether answers are rendered."""

    def __init__(self, *, markdown: bool):
        super().__init__(typing=True)
        self._markdown = markdown
        self._pastes: dict[str, str] = {}  # abbreviation -> text

    def lines(self, status: Callable[[], str]) -> Iterator[str]:
        """Yield the lines typed."""
        prompt: PromptSession[str] = PromptSession(
            history=History(history_file()),
            completer=ThreadedCompleter(LineCompleter()),
            complete_while_typing=Condition(lambda: COMMAND.fullmatch(prompt.default_buffer.text) is not None),
            key_bindings=self._keys(),
            input=Keyboard(sys.stdin),
        )
        while True:
            try:
                line = prompt.prompt("> ", rprompt=[("fg:ansibrightblack", printable(status()) + " ")])
            except KeyboardInterrupt:
                process.take()
                self.note("Ctrl-D leaves.")
            except EOFError:
                return
            else:
                yield line

    def show(self, chunks: Iterator[Chunk]) -> Answer:
        """Show an answer as it arrives, with its Markdown rendered."""
        if not self._markdown:
            return super().show(chunks)
        answer = None
        with MarkdownWriter(Console(file=sys.stdout)) as writer:
            for chunk in chunks:
                writer.add(printable(chunk.text))
                answer = chunk.answer
        assert answer is not None
        return answer

    def full(self, text: str) -> str:
        """A line's text with long pastes written out."""
        return PASTE.sub(lambda found: self._pastes.get(found[0], found[0]), text)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add(Keys.BracketedPaste)
        def _(event: KeyPressEvent) -> None:
            self._paste(event.current_buffer, event.data.replace("\r\n", "\n").replace("\r", "\n"))

        @keys.add("tab")
        def _(event: KeyPressEvent) -> None:
            """Complete at once, where prompt_toolkit would start to look: the next key may have been typed already."""
            buffer = event.current_buffer
            if buffer.complete_state is not None:
                buffer.complete_next()
                return
            found = list(LineCompleter().get_completions(buffer.document, CompleteEvent(completion_requested=True)))
            if len(found) == 1:
                buffer.apply_completion(found[0])
            elif common := get_common_complete_suffix(buffer.document, found):
                buffer.insert_text(common)
            elif found:
                buffer.start_completion()

        return keys

    def _paste(self, buffer: Buffer, text: str) -> None:
        """Insert pasted text; a long one is abbreviated, and pieces that follow each other are joined."""
        last = next(reversed(self._pastes), None)
        if last is not None and buffer.document.text_before_cursor.endswith(last):
            buffer.delete_before_cursor(len(last))
            text = self._pastes.pop(last) + text
        if len(text) > LONG_PASTE_CHARS:
            name = f"[pasted text {len(self._pastes) + 1}, {len(text):,} characters]"
            self._pastes[name], text = text, name
        buffer.insert_text(text)


class Keyboard(Vt100Input):
    """Reads keys; more than MAX_TYPED_CHARS at once are taken as a paste, as some terminals do not mark pastes."""

    def read_keys(self) -> list[KeyPress]:
        """The keys pressed since the last call, long runs of characters as one paste."""
        keys: list[KeyPress] = []
        for typed_text, run in groupby(super().read_keys(), key=lambda press: not isinstance(press.key, Keys)):
            presses = list(run)
            if typed_text and len(presses) > MAX_TYPED_CHARS:
                text = "".join(press.data for press in presses)
                presses = [KeyPress(Keys.BracketedPaste, text)]
            keys += presses
        return keys


class History(FileHistory):
    """Lines of this run and of earlier ones; only of this run where the file cannot be read or written."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # readable by its owner only

    def load_history_strings(self) -> Iterable[str]:
        """The lines of earlier runs, latest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Store a line, unless it has an abbreviated paste that a later run could not write out."""
        if not PASTE.search(string):
            with suppress(OSError, UnicodeError):  # UnicodeError: half a surrogate pair
                super().store_string(string)


def history_file() -> Path:
    """The file of earlier lines, after the XDG base directories; the null device where there is no home folder."""
    states = (os.environ.get("XDG_STATE_HOME", ""), os.path.expanduser("~/.local/state"))  # noqa: PTH111
    return next(
        (Path(state) / "fastvlm-mlx" / "chat_history" for state in states if state.startswith("/")), Path(os.devnull)
    )


class LineCompleter(Completer):
    """Completes commands at the beginning of a line, and paths where one is expected."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions of the text before the cursor."""
        line = document.text_before_cursor
        if COMMAND.fullmatch(line):
            for name, (argument, meaning) in typed.COMMANDS.items():
                if name.startswith(line[1:].lower()):
                    yield Completion(f"/{name}" + " " * bool(argument), -len(line), f"/{name}", meaning)
        found = PATH.search(line)
        word = found[0] if found is not None else ""
        if re.match(r"/(image|load|save)\s", line) or word.startswith(("/", "~/", "./", "../")):
            yield from _paths(word)


def _paths(word: str) -> Iterator[Completion]:
    """Completions of a path: the files and folders that begin like it, with spaces escaped."""
    head, begun = os.path.split(re.sub(r"\\(.)", r"\1", word))
    try:
        with os.scandir(os.path.expanduser(head) or ".") as entries:  # noqa: PTH111
            names = [(entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(begun)]
    except OSError:
        return
    for name, folder in sorted(names)[:MAX_COMPLETIONS]:
        if name.startswith(".") <= begun.startswith("."):
            path = re.sub(r"([\s\\'\"()&;$`!*?\[\]{}<>|#])", r"\\\1", name[len(begun) :])
            yield Completion(path + "/" * folder, 0, printable(name) + "/" * folder)
