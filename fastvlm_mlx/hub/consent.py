"""Agreement to a first download, of which people are told the size and the terms beforehand."""

from collections.abc import Callable

from ..errors import HubError, warn

Agree = Callable[[str], bool]  # shown what is about to be fetched; False stops it


def ask(notice: str, name: str, agree: Agree | None) -> None:
    """Have a first download agreed to, on what terms included, or warn of it (FastVLMWarning); raises HubError if it is not."""
    notice += " Its weights are for research use only unless its licence says more."
    if agree is None:
        warn(notice)
    elif not agree(notice):
        raise HubError(
            f"{name} was not downloaded, which takes `agree`; run 'fastvlm-mlx download {name}', or try "
            "`model='tiny'`, the model inside."
        )
