"""The commands put together: one file per command, each of which parses, calls the library and prints."""

from typing import Annotated

import typer

from .bench import bench
from .chat import chat
from .convert import convert
from .download import download
from .generate import generate
from .info import info
from .quantize import quantize

app = typer.Typer(
    name="fastvlm-mlx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich would double the time to print it
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, convert, quantize, download, info, bench):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        from fastvlm_mlx import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """FastVLM on Apple Silicon: a picture and a question in, an answer out."""
