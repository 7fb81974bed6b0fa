"""Agreement to a first download, after its size and terms have been named."""

from collections.abc import Callable

from ..errors import HubError, warn

Agree = Callable[[str], bool]  # called with the download's size and terms; False stops it


def ask(notice: str, name: str, agree: Agree | None) -> None:
    """Have `agree` decide about a first download, of which it is told the size and the terms.

    Without `agree`, that is a FastVLMWarning, and the download goes on. Raises HubError where it is not agreed to.
    """
    notice += " Its weights are for research use only unless its licence says more."
    if agree is None:
        warn(notice)
    elif not agree(notice):
        raise HubError(
            f"{name} was not downloaded, which takes `agree`; run 'fastvlm-mlx download {name}', or try "
            "`model='tiny'`, the model inside."
        )
