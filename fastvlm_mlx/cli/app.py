"""The commands as one application; only the command that is asked for is imported."""

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from .options import TakesPictures

# Argument of the library -> argument of a command.
OTHERWISE_NAMED = {"tokenizer": "tokenizer_path", "agree": "yes", "size": "random"}
WITH_PICTURES = ("generate", "chat", "bench")
COMMANDS = ("generate", "chat", "batch", "convert", "quantize", "tune", "download", "info", "bench", "doctor", "serve")


def build(arguments: Sequence[str] = ()) -> typer.Typer:
    """The application with the one command that `arguments` begin with, or with all commands for help and completion.

    Importing a command and building it takes a millisecond.
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
        command_class = TakesPictures if name in WITH_PICTURES else None
        app.command(name, cls=command_class)(getattr(import_module(f".{name}", __package__), name))
    return app


def flags(command: str) -> dict[str, str]:
    """Argument of the library -> flag of a command, such as "max_tokens" -> "--max-tokens".

    Arguments that the command does not have are looked up in `generate` and `convert`.
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys((command, "generate", "convert")):
        group: Any = typer.main.get_command(build([name]))
        for parameter in sorted(group.commands[name].params, key=_is_positional):
            options = [option for option in parameter.opts if option.startswith("--")]
            flag = options[0] if options else str(parameter.name).upper()
            if not options:
                found.setdefault("model", flag)  # which every positional argument names
            found.setdefault(str(parameter.name), flag)
            found.setdefault(flag.removeprefix("--").replace("-", "_"), flag)
    return found | {theirs: found[ours] for theirs, ours in OTHERWISE_NAMED.items() if ours in found}


def _is_positional(parameter: Any) -> bool:
    return not any(option.startswith("--") for option in parameter.opts)


def _print_version(asked: bool) -> None:
    if asked:
        from ..version import __version__

        print(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """FastVLM on Apple Silicon: a picture and a question in, an answer out."""
