"""A typed line -> a command, or a question and the pictures whose paths were typed, pasted or dragged into it.

Terminals write a dragged file quoted for a shell, as it is, or as a file:// address. Only ASCII blanks separate paths:
macOS has U+202F in the names of its screenshots, and no terminal escapes it.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice

from ...errors import ImageError, PromptError, shown
from ...files import paths
from ...inputs import folder, imagefile

COMMANDS = {
    "image": ("PATH ...", "ask the next question about these pictures, or a folder's; or drag them into the line"),
    "paste": ("", "ask the next question about the picture on the clipboard"),
    "undo": ("", "take back the pictures that wait for a question, or else the last question and its answer"),
    "retry": ("[TEMPERATURE]", "answer the last question again"),
    "clear": ("", "start over, with the same system prompt"),
    "system": ("[TEXT]", "print or replace the system prompt; 'default' restores the original one"),
    "save": ("[PATH]", "write the conversation to a file"),
    "load": ("PATH", "continue a saved conversation"),
    "stats": ("", "times of the last answer, and what is in memory"),
    "help": ("", "this list"),
    "quit": ("", "leave (also Ctrl-D)"),
}
BARE = {"quit": "quit", "exit": "quit", "bye": "quit", "help": "help"}  # lines that are meant as a command
ALIASES = {"exit": "quit", "q": "quit", "?": "help", "images": "image", "reset": "clear"}

# What ends in one of these is meant as a picture, also where it will be refused, with the reason.
PICTURE_SUFFIXES = (
    *folder.SUFFIXES, ".ico", ".jp2", ".jxl", ".pdf", ".psd", ".svg", ".raw", ".dng", ".nef", ".cr2", ".cr3", ".arw",
    ".mov", ".mp4",
)  # fmt: skip
PLAIN = ("/", "~", "./", "../", "file://")  # beginnings that only a path has
MAX_PATH_CHARS = 1024  # characters of a path
MIN_PASTE_CHARS = 20_000  # characters from which a line counts as pasted text, without paths of pictures in it
MAX_PASSED_NAMES = 4  # endings of pictures' names that are tried as the end of a path with spaces
WORDS = tuple(
    re.compile(rf"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^{blanks}'"\\])+""", re.DOTALL)
    for blanks in (r" \t\r\n\f\v", r"\s")  # the second for a path with a wide space after it
)
WORD = WORDS[0]
ABSOLUTE = re.compile(r"(?:~?/[^/\s]+/|~/|file:/)\S")  # a path into a folder; no command begins so
BLANK = re.compile(r"\s")
QUOTED = re.compile(r"""\\(.)|'([^']*)'|"((?:\\.|[^"\\])*)"|([^'"\\]+)""", re.DOTALL)
SENTENCE_END = ",.;:!?)]>»。，？！：；"
# A web address that is not quoted: asked about, its picture would be answered as if it had been seen.
ADDRESS = re.compile(
    r"""(?<![A-Za-z0-9_'"`“‘«])(?:(?!file:)[a-z][a-z0-9+.-]*[:：]//?[^\s/'"]\S*|data:image/\S*|www\.[\w.-]+\.\w+/\S+)""",
    re.IGNORECASE,
)
# One that ends as a picture does, scheme or not: "i.example.com/x.jpg". A relative path has no dot in its first folder.
PICTURE_ADDRESS = re.compile(
    r"""(?:[a-z][a-z0-9+.-]*:/*|(?<![\w./~-])(?:[a-z0-9-]+\.)+[a-z]{2,}/)[^\s'"`]*"""
    rf"(?:{'|'.join(map(re.escape, PICTURE_SUFFIXES))})\b",
    re.IGNORECASE,
)
NAME_END = re.compile(
    f"(?:{'|'.join(map(re.escape, PICTURE_SUFFIXES))})(?=[\\s{re.escape(SENTENCE_END)}]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Typed:
    """A parsed line: a command of COMMANDS with its argument, or None and a question; and the paths of its pictures."""

    command: str | None
    text: str
    pictures: tuple[str, ...] = ()


def parse(line: str) -> Typed:
    """Parse a line.

    Raises PromptError for a command that does not exist, one with an argument it does not take, or a NUL.
    """
    line = line.strip()
    if "\0" in line:
        raise PromptError("The line holds a NUL character; remove it.")
    if line.startswith("/"):
        word, rest = [*line.split(maxsplit=1), ""][:2]
        name = ALIASES.get(word[1:].lower(), word[1:].lower())
        if name == "image":
            return Typed(name, *_pictures_of_command(rest.strip()))
        if name in COMMANDS:
            if rest.strip() and not COMMANDS[name][0]:
                raise PromptError(
                    f"/{name} takes nothing after it, but {shown(rest.strip()[:40])} was given; leave it out."
                )
            return Typed(name, rest.strip())
        if re.fullmatch(r"/[\w?-]*", word) and not os.path.isfile(word):
            close = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{close[0]}? " if close else ""
            raise PromptError(f"There is no command {shown(word)}; {hint}/help lists them.")
    return Typed(None, *pictures_in(line))


def check_addresses(text: str) -> None:
    """Raise ImageError for a web address: nothing is downloaded, so the model would not see its picture or page."""
    if len(text) > MIN_PASTE_CHARS:
        return
    address = ADDRESS.search(text) or PICTURE_ADDRESS.search(text)
    if address is not None:
        raise ImageError(
            f"{shown(address[0].rstrip(SENTENCE_END))} is an address, and nothing is fetched from the network; save "
            "the picture and give its path. If it is a text to ask about, put it in quotes."
        )


def pictures_in(line: str, *, meant: bool = False) -> tuple[str, tuple[str, ...]]:
    """The text of a line without the paths of pictures at its beginning and end, and the paths of all its pictures.

    A picture named in the middle of a sentence leaves its file name there. A relative path counts where the file
    exists, or always with `meant`.
    """
    parts: list[str] = []  # text, path, text, ..., path, text
    place = begin = 0
    while len(line) <= MIN_PASTE_CHARS and (place := _word_start(line, place)) < len(line):
        path, end = _picture_at(line, place, meant)
        if path is not None:
            parts += [line[begin:place], path]
            begin = end
        place = end
    parts.append(line[begin:])
    said = [place for place in range(0, len(parts), 2) if parts[place].strip()]
    within = range(said[0], said[-1]) if said else range(0)  # the parts between words
    sentence = range(within.start, len(parts)) if within else within  # then the last picture is one of its words too
    text = "".join(
        part if place % 2 == 0 else os.path.basename(part) if place in sentence else " "
        for place, part in enumerate(parts)
    )
    return text.strip(), tuple(parts[1::2])


def path_of(text: str) -> str:
    """The path that a command's argument is, with or without quotes, backslashes, file:// and spaces."""
    word = WORD.fullmatch(text)
    plain = _unquoted(text) if word is not None else text
    return paths.find(text if os.path.exists(paths.find(text)) else plain)


def _pictures_of_command(text: str) -> tuple[str, tuple[str, ...]]:
    """The question and the pictures after /image: one path (with spaces or not), a folder, a pattern, or several."""
    path = path_of(text)
    if (found := folder.pictures(path)) != [path] or os.path.isfile(path):
        return "", tuple(found)
    rest, named = pictures_in(text, meant=True)
    if not named and text:
        return "", (path,)
    return rest, tuple(picture for path in named for picture in folder.pictures(path))


def _word_start(line: str, place: int) -> int:
    while place < len(line) and line[place].isspace():  # any kind of space, before a path
        place += 1
    return place


def _picture_at(line: str, start: int, meant: bool) -> tuple[str | None, int]:
    """(path of the picture, or None; end of the word) for the word that begins at `start`."""
    words = [word.match(line, start, min(len(line), start + MAX_PATH_CHARS)) for word in WORDS]
    for raw in dict.fromkeys(word[0] for word in words if word is not None):
        for cut in (raw, raw.rstrip(SENTENCE_END)):
            unquoted = _unquoted(cut)
            if unquoted.startswith(PLAIN) and imagefile.is_picture(path := paths.find(unquoted)):
                return path, start + len(cut)
            if unquoted.lower().endswith(PICTURE_SUFFIXES):
                path = paths.find(unquoted)
                sure = meant or unquoted.startswith(PLAIN)
                if os.path.isfile(path) or (sure and _unescaped(line, start) is None):
                    return path, start + len(cut)
    if (unescaped := _unescaped(line, start)) is not None:
        return unescaped
    blank = BLANK.search(line, start)
    return None, blank.start() if blank else len(line)


def _unescaped(line: str, start: int) -> tuple[str, int] | None:
    """The picture whose path begins at `start` with its spaces unescaped, and where it ends.

    None where no such file exists, and the path cannot be meant for a missing one either.
    """
    if not line.startswith(("/", "~/"), start):
        return None
    ends = NAME_END.finditer(line, start, min(len(line), start + MAX_PATH_CHARS))
    missing: tuple[str, int] | None = None
    for end in islice(ends, MAX_PASSED_NAMES):
        path = paths.find(line[start : end.end()])
        if os.path.isfile(path):
            return path, end.end()
        missing = missing or (path, end.end())
    return missing if missing is not None and ABSOLUTE.match(line, start) else None


def _unquoted(word: str) -> str:
    """A word with the shell's quotes and backslashes resolved."""
    return "".join(
        escaped or single or re.sub(r'\\([\\"$`])', r"\1", double) or plain
        for escaped, single, double, plain in QUOTED.findall(word)
    )
