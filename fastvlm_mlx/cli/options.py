"""Options that several commands share, so that each is described once."""

import sys
from typing import Annotated

import typer

from ..hub import Agree

DEFAULT_MODEL = "apple/FastVLM-0.5B"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        "--model-path",
        envvar="FASTVLM_MODEL",
        help="A folder (Apple's checkpoint or a converted one), a Hugging Face Hub name, or 'tiny', the built-in model.",
    ),
]
TokenizerPath = Annotated[str | None, typer.Option(help="Take the tokenizer from this folder instead of the model's.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Agree to a first download from the Hub without being asked.")]


def agree_to_download(yes: bool) -> Agree:
    """Ask on the terminal before a first download; without a terminal only --yes counts as agreement."""

    def agree(notice: str) -> bool:
        print(notice, file=sys.stderr)
        if yes:
            return True
        return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("Download it?", err=True)

    return agree
