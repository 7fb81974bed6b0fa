"""The command line: one file per command, each of which parses, calls the library and prints.

stdout carries the answer; everything else goes to stderr. Exit codes: 0 done, 1 a FastVLMError (its message, no traceback),
2 wrong usage, 130 interrupted.
"""

import os
import sys
from typing import NoReturn

import typer

from .convert import convert
from .download import download
from .generate import generate
from .info import info

app = typer.Typer(
    name="fastvlm-mlx",
    help="FastVLM on Apple Silicon: a picture and a question in, an answer out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, convert, download, info):
    app.command()(command)


@app.callback()
def _options(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        from fastvlm_mlx import __version__

        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Entry point of `fastvlm-mlx` and `python -m fastvlm_mlx`."""
    from fastvlm_mlx.errors import FastVLMError

    try:
        app(standalone_mode=True)
    except FastVLMError as error:
        print(f"fastvlm-mlx: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader has left: no complaint, and none at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    else:
        code = 0
    sys.exit(code)
