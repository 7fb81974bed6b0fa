"""`fastvlm-mlx download`: download a model into the local cache, from the Hub or from Apple's archives."""

from typing import Annotated

import typer

from .options import DEFAULT_MODEL, Yes, agree_to_download


def download(
    name: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face Hub name, OWNER/NAME, or one of Apple's archives, llava-fastvithd_0.5b_stage3."
        ),
    ] = DEFAULT_MODEL,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit instead of the newest; use it by the printed folder.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="The SHA-256 that an archive has to have.")] = None,
    yes: Yes = False,
) -> None:
    """Download a model, so that later runs work offline.

    Prints the folder it is in. An interrupted download continues where it stopped. A private model needs HF_TOKEN, or
    'hf auth login'. Archives come from Apple, or from the address in FASTVLM_ARCHIVES, and are kept in FASTVLM_CACHE.

    Example: fastvlm-mlx download apple/FastVLM-0.5B

    An archive: fastvlm-mlx download llava-fastvithd_0.5b_stage3
    """
    from ..hub.find import find

    print(find(name, revision=revision, sha256=sha256, agree=agree_to_download(yes)).folder)
