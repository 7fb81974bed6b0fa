"""A model's name -> its folder: the built-in model, a folder, one of Apple's archives, or a repository of the Hub.

"tiny" is always the built-in model; an existing folder comes before any other meaning of its name. A repository is
named OWNER/NAME, with a revision OWNER/NAME@REVISION, or by its address.
"""

import os
from pathlib import Path

from ..errors import HubError, OptionError, shown
from ..files import paths
from ..files.digests import check_digest
from .consent import Agree
from .names import ARCHIVE, BUILT_IN, Found, hub_model, is_revision


def find(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    sha256: str | None = None,
    agree: Agree | None = None,
    cached_only: bool = False,
) -> Found:
    """Find a model's folder; a model that is not on this machine is downloaded.

    `revision` is a branch, tag or commit of a Hub repository. `sha256` is the digest that one of Apple's archives has
    to have. `agree` is asked before a download; without it, there is a FastVLMWarning with the download's size and
    terms. With `cached_only` nothing is downloaded. Raises HubError where the name means nothing, or the model cannot
    be had, and OptionError for an argument that does not go with this kind of name.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise HubError(f"`model` is {shown(model)}, expected a folder, a Hub name (OWNER/NAME) or 'tiny'.")
    model = os.fsdecode(model)
    if revision is not None and not (isinstance(revision, str) and is_revision(revision)):
        raise OptionError(f"`revision` is {shown(revision)}, expected a branch, tag or commit.")
    sha256 = check_digest(sha256)
    if sha256 is not None and (not ARCHIVE.fullmatch(model) or revision is not None):
        raise OptionError(
            "`sha256` is for Apple's archives; give it with one, or check a model by 'fastvlm-mlx info --verify'."
        )
    if revision is not None and (model == BUILT_IN or os.path.isdir(os.path.expanduser(model))):  # noqa: PTH111, PTH112
        raise OptionError(
            f"{shown(model)} is a folder, which has no revisions; leave `revision` out, or name a model of the Hub."
        )
    if model == BUILT_IN:
        folder = Path(__file__).parents[1] / BUILT_IN
        if not folder.is_dir():
            raise HubError("The built-in model 'tiny' is not part of this installation; name a folder or a Hub model.")
        return Found(folder, model, "built-in")
    if not model:
        raise HubError("The model's name is empty; name a folder, a Hub model, or 'tiny'.")
    folder = Path(paths.find(model))
    try:
        if folder.is_dir():
            return Found(folder, model, "folder")
        exists = folder.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HubError(
            f"{shown(model)} cannot be a folder ({reason}), and is not a Hub name; check `model`."
        ) from error
    if exists and model.lower().endswith(".zip"):
        raise HubError(f"{shown(model)} is an archive; unpack it and name the folder that comes out.", path=folder)
    if exists:
        raise HubError(
            f"{shown(model)} is a file; expected the folder that holds config.json and the weights.", path=folder
        )
    if ARCHIVE.fullmatch(model):
        from . import archive

        if revision is not None:
            raise OptionError(f"{model} is an archive, which has no revisions; give its name alone.")
        return Found(archive.find(model, agree, cached_only=cached_only, sha256=sha256), model, "archive")
    named = hub_model(model)
    if named is None and "://" in model:
        raise HubError(
            f"{shown(model)} is not the address of a model on the Hugging Face Hub; name a folder, a Hub model "
            "(OWNER/NAME or https://huggingface.co/OWNER/NAME) or 'tiny'."
        )
    if named is None:
        raise HubError(
            f"{shown(model)}: no such folder, and not a Hub name (OWNER/NAME) or 'tiny'; check the spelling."
        )
    if named.revision is not None and revision not in (None, named.revision):
        raise OptionError(f"{shown(model)} names a revision, and `revision` is {shown(revision)}; give one of them.")
    from . import huggingface

    return Found(huggingface.find(named.name, named.revision or revision, agree, cached_only), named.name, "hub")


def find_tokenizer(folder: str | os.PathLike[str] | None) -> Path | None:
    """The folder to take the tokenizer from instead of the model's own; None where none is given.

    Raises OptionError where it does not exist.
    """
    if folder is None:
        return None
    if not isinstance(folder, (str, os.PathLike)):
        raise OptionError(f"`tokenizer` is {shown(folder)}, expected the path of a folder.")
    path = Path(paths.find(folder))
    if not os.path.isdir(path):  # noqa: PTH112  (false, too, for impossible names)
        raise OptionError(f"{shown(os.fspath(folder))}: no such folder to take the tokenizer from; check `tokenizer`.")
    return path
