"""Options that several commands share, and what is done with them."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import ImageError, OptionError
from ..hub.consent import Agree

if TYPE_CHECKING:
    from pathlib import Path

    from ..inputs.image import Source

DEFAULT_MODEL = "apple/FastVLM-0.5B"
MAX_PIXELS = 1 << 26  # equals the library's, which --help does not import

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        "--model-path",
        envvar="FASTVLM_MODEL",
        help="A folder (a FastVLM checkpoint of any layout), a Hugging Face Hub name, or 'tiny', the built-in model.",
    ),
]
Pictures = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        "-i",
        "--image-file",
        help="A picture (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC; on Linux HEIC needs an extra), a folder of them "
        "or a pattern. Several may follow one another.",
    ),
]
PICTURES = ("--image", "-i", "--image-file")
STDIN = "-"
MaxTokens = Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        "--temp",
        help="0 always takes the likeliest token; above, tokens are drawn, and higher varies more.",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", "--top_p", help="When drawing: only from the likeliest tokens that add up to this probability."
    ),
]
TopK = Annotated[
    int, typer.Option("--top-k", "--top_k", help="When drawing: only from so many of the likeliest tokens; 0 is all.")
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        "--min_p",
        help="When drawing: only tokens at least so many times as likely as the likeliest, 0 to 1.",
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Above 1, tokens in the text of the prompt or earlier in the answer are made less likely; 1 is off.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; may be given up to 4 times.", show_default=False),
]
Schema = Annotated[
    str | None,
    typer.Option(
        help="A file with the JSON Schema that the answer keeps to; 'json' for any JSON object. Needs an extra."
    ),
]
Seed = Annotated[int | None, typer.Option(help="When drawing: the same seed draws the same answer.")]
System = Annotated[str | None, typer.Option(help="A system prompt in place of 'You are a helpful assistant.'")]
Load4Bit = Annotated[bool, typer.Option("--load-4bit", help="Short for --bits 4.")]
Load8Bit = Annotated[bool, typer.Option("--load-8bit", help="Short for --bits 8.")]
ComputeType = Annotated[
    str | None,
    typer.Option(help="Compute in float32, float16 or bfloat16; by default float32 on a CPU, as stored on a GPU."),
]
Resolution = Annotated[
    int | None, typer.Option(help="Side in pixels that pictures are brought to: a multiple of 64 from 64 to 4096.")
]
MaxPixels = Annotated[int, typer.Option(help="Refuse larger pictures before decoding them.")]
Out = Annotated[
    str,
    typer.Option(
        "--out", "-o", help="The folder to write; it must not exist yet, unless --force is given.", show_default=False
    ),
]
TokenizerPath = Annotated[str | None, typer.Option(help="Take the tokenizer from this folder instead of the model's.")]
Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of a model of the Hub instead of the newest.")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", help="Answer with what fine-tuning learned: a folder of tune's, of PEFT's or of mlx-lm's."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Agree to a first download from the Hub without being asked.")]


def one_of_bits(bits: int | None, load_4bit: bool, load_8bit: bool) -> int | None:
    """The bits that --bits, --load-4bit or --load-8bit ask for; raises OptionError where several are given."""
    if sum((bits is not None, load_4bit, load_8bit)) > 1:
        raise OptionError("--bits, --load-4bit and --load-8bit were given together; choose one.")
    return 4 if load_4bit else 8 if load_8bit else bits


class TakesPictures(TyperCommand):
    """A command whose --image takes every following word up to the next option: "--image before.jpg after.jpg"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its words, as click expects."""
        every: list[str] = []
        pictures = given = False  # whether pictures may follow, and whether the option has its first
        for place, word in enumerate(args):
            if word == "--":
                every += args[place:]
                break
            if word.startswith("-") and word != STDIN and (given or not pictures):
                name = word.partition("=")[0]
                pictures, given = (
                    name in PICTURES or (word.startswith("-i") and not word.startswith("--")),
                    word not in PICTURES,
                )
            elif pictures and given:
                every.append(PICTURES[0])
            elif pictures:
                given = True
            every.append(word)
        return super().parse_args(ctx, every)


def pictures_named(images: Sequence[str] | None, *, stdin_is_free: bool = True) -> "list[Source]":
    """The pictures that --image names: paths, the pictures of a folder or a pattern, and "-" for the bytes on stdin.

    Raises ImageError, and OptionError where stdin is taken by something else.
    """
    from ..files import paths
    from ..inputs import folder
    from ..inputs.imagefile import read, read_open

    found: list[Source] = []
    for image in images or []:
        if image != STDIN:
            named = folder.pictures(image)
            for path in named:
                if not os.path.exists(paths.find(path)):  # noqa: PTH110  (false for impossible names)
                    read(path)  # raises the sentence about it, before a model is looked for
            found += named
        elif not stdin_is_free:
            raise OptionError(
                "--image - takes the picture from stdin, which something else is read from; give the path of a file."
            )
        else:
            stdin_is_free = False
            data = read_open(sys.stdin.buffer) if sys.stdin is not None else b""
            if not data:
                raise ImageError(
                    "'-' stands for a picture on stdin, and no such image came; pipe one in, or give a path."
                )
            found.append(data)
    return found


def schema_named(schema: str | None) -> "str | Path | None":
    """What --schema names: a file, 'json' for any JSON object, or None."""
    from pathlib import Path

    return schema if schema in (None, "json") else Path(schema)


def agree_to_download(yes: bool, pictures: "Sequence[Source]" = (), max_pixels: int = MAX_PIXELS) -> Agree:
    """A function that asks on the terminal before a first download; without a terminal only --yes agrees.

    `pictures` are loaded before anything is downloaded: raises ImageError for one that cannot be used.
    """

    def agree(notice: str) -> bool:
        from ..inputs.image import load_image

        for picture in pictures:
            load_image(picture, max_pixels=max_pixels)
        print(notice, file=sys.stderr)
        if yes:
            return True
        return (
            sys.stdin is not None
            and sys.stdin.isatty()
            and sys.stderr.isatty()
            and typer.confirm("Download it?", err=True)
        )

    return agree
