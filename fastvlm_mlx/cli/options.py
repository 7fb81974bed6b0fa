"""Options that several commands share, so that each is described once."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import OptionError
from ..hub.consent import Agree

DEFAULT_MODEL = "apple/FastVLM-0.5B"
MAX_PIXELS = 1 << 26  # the library's own, which --help shows without importing it

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
        help="A picture (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF; HEIC with an extra). Repeat for several.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "--temp", help="0 always takes the likeliest token; above, tokens are drawn, and higher varies more."
    ),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", "--top_p", help="When drawing: only from the likeliest tokens that add up to this probability."),
]
Seed = Annotated[int | None, typer.Option(help="When drawing: the same seed draws the same answer.")]
System = Annotated[str | None, typer.Option(help="A system prompt in place of 'You are a helpful assistant.'")]
Load4Bit = Annotated[bool, typer.Option("--load-4bit", help="The same as --bits 4.")]
Load8Bit = Annotated[bool, typer.Option("--load-8bit", help="The same as --bits 8.")]
ComputeType = Annotated[
    str | None, typer.Option(help="Compute in float32, float16 or bfloat16; by default float32 on a CPU, as stored on a GPU.")
]
Resolution = Annotated[
    int | None, typer.Option(help="Side in pixels that pictures are brought to: a multiple of 64 from 64 to 4096.")
]
MaxPixels = Annotated[int, typer.Option(help="Refuse larger pictures before decoding them.")]
Out = Annotated[
    str,
    typer.Option("--out", "-o", help="The folder to write; it must not exist yet, unless --force is given.", show_default=False),
]
TokenizerPath = Annotated[str | None, typer.Option(help="Take the tokenizer from this folder instead of the model's.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of a model of the Hub instead of the newest.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Agree to a first download from the Hub without being asked.")]


def one_of_bits(bits: int | None, load_4bit: bool, load_8bit: bool) -> int | None:
    """The bits that were asked for in one of three ways; raises OptionError for several at once."""
    if sum((bits is not None, load_4bit, load_8bit)) > 1:
        raise OptionError("--bits, --load-4bit and --load-8bit were given together; choose one.")
    return 4 if load_4bit else 8 if load_8bit else bits


def agree_to_download(yes: bool, pictures: Sequence[str] = (), max_pixels: int = MAX_PIXELS) -> Agree:
    """Ask on the terminal before a first download; without a terminal only --yes counts as agreement.

    Before gigabytes are fetched, `pictures` are opened: raises ImageError for one that cannot be.
    """

    def agree(notice: str) -> bool:
        from ..inputs.image import load_image

        for picture in pictures:
            load_image(picture, max_pixels=max_pixels)
        print(notice, file=sys.stderr)
        if yes:
            return True
        return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("Download it?", err=True)

    return agree
