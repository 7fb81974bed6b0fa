"""The commands put together: one file per command, each of which parses, calls the library and prints."""

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

COMMANDS = ("generate", "chat", "convert", "quantize", "download", "info", "bench")


def build(arguments: Sequence[str] = ()) -> typer.Typer:
    """The command line: the one command that `arguments` begin with, or all of them, for help, completion and mistakes.

    A command takes a millisecond to import and to put together.
    """
    app = typer.Typer(
        name="fastvlm-mlx",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: importing rich would double the time to print it
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS:
        app.command(name)(getattr(import_module(f".{name}", __package__), name))
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from ..version import __version__

        print(__version__)
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """FastVLM on Apple Silicon: a picture and a question in, an answer out."""
