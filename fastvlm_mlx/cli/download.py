"""`fastvlm-mlx download`: fetch a model from the Hub into the local cache."""

from typing import Annotated

import typer

from .options import DEFAULT_MODEL, Yes, agree_to_download


def download(
    name: Annotated[str, typer.Argument(help="A Hugging Face Hub name, OWNER/NAME.")] = DEFAULT_MODEL,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit instead of the newest; use it by the folder printed.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Fetch a model, so that later runs work offline.

    Prints the folder it is in.

    Example: fastvlm-mlx download apple/FastVLM-0.5B
    """
    from ..hub import find

    print(find(name, revision=revision, agree=agree_to_download(yes)))
