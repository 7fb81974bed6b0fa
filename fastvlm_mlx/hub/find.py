"""A model's name -> the folder that holds it: a folder as given, the built-in model, a repository of the Hugging Face Hub, or
one of Apple's archives.

An existing folder wins over any other name of the same spelling, and "tiny" is always the built-in model.
"""

import errno
import os
import re
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from ..errors import CheckpointError, FastVLMError, FastVLMWarning, HubError, OptionError, shown

BUILT_IN = "tiny"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ARCHIVE = re.compile(r"(llava-fastvithd_(?:0\.5b|1\.5b|7b)_stage[23])(?:\.zip)?")  # of apple/ml-fastvlm
FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "added_tokens.json", "preprocessor_config.json", "processor_config.json", "LICENSE*",
)  # fmt: skip

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

Agree = Callable[[str], bool]  # shown what is about to be fetched; False stops it


def find(
    model: str | os.PathLike[str], *, revision: str | None = None, agree: Agree | None = None, cached_only: bool = False
) -> Path:
    """The folder of a model; fetches a Hub repository that is not in the cache if `agree` says so.

    Without `agree`, it is fetched with a FastVLMWarning of its size and terms; with `cached_only`, never.
    Raises HubError for a name that is neither, and where the Hub cannot be reached or has no such model.
    """
    model = os.fspath(model)
    if model == BUILT_IN:
        folder = Path(__file__).parents[1] / BUILT_IN
        if not folder.is_dir():
            raise HubError("The built-in model 'tiny' is not part of this installation; name a folder or a Hub model.")
        return folder
    if not model:
        raise HubError("The model's name is empty; name a folder, a Hub model, or 'tiny'.")
    folder = Path(os.path.expanduser(model))  # noqa: PTH111  (leaves what it cannot expand as it is)
    try:
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HubError(f"{shown(model)} cannot be a folder ({reason}), and is not a Hub name; check --model.") from error
    if exists and model.lower().endswith(".zip"):
        raise HubError(f"{shown(model)} is an archive; unpack it and name the folder that comes out.")
    if exists:
        raise HubError(f"{shown(model)} is a file; expected the folder that holds config.json and the weights.")
    if ARCHIVE.fullmatch(model):
        from . import archive

        if revision is not None:
            raise OptionError(f"{model} is an archive, which has no revisions; give its name alone.")
        return archive.find(model, agree, cached_only=cached_only)
    if not HUB_NAME.fullmatch(model):
        raise HubError(f"{shown(model)}: no such folder, and not a Hub name (OWNER/NAME) or 'tiny'; check the spelling.")
    return _from_hub(model, revision, agree, cached_only)


def find_tokenizer(folder: str | None) -> Path | None:
    """The folder to take the tokenizer from instead of the model's, if one is named; raises OptionError where it is not there."""
    if folder is None:
        return None
    path = Path(os.path.expanduser(folder))  # noqa: PTH111  (raises nothing)
    if not os.path.isdir(path):  # noqa: PTH112  (false, too, for impossible names)
        raise OptionError(f"{shown(folder)}: no such folder to take the tokenizer from; check --tokenizer-path.")
    return path


def _from_hub(name: str, revision: str | None, agree: Agree | None, cached_only: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(local_only: bool) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_files_only=local_only))

    try:
        cached = fetch(local_only=True)
        if _complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise HubError(f"{shown(name)}: no such folder, and not a Hub name ({error}); check --model.") from error
    except (CheckpointError, OSError, ValueError):  # a cache that is damaged or cannot be read: fetch again
        pass
    if cached_only:
        raise HubError(f"{name!r}: no such folder, and not in the local cache; fetch it first: fastvlm-mlx download {name}")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
        size = sum(file.size or 0 for file in info.siblings or [] if _wanted(file.rfilename))
        ask(f"{name} takes {size / 1e9:.1f} GB to download.", name, agree)
        return fetch(local_only=False)
    except FastVLMError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise HubError(f"{name!r}: no such folder, and the Hub has no such model open to you (HTTP {status}).") from error
        raise HubError(f"{name!r}: no such folder, and the Hub answered with an error (HTTP {status}); try again.") from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise _unreachable(name, error) from error
        raise HubError(
            f"{name!r} cannot be stored in the cache ({error.strerror}); make {error.filename or 'it'} writable, or set HF_HOME "
            "to a folder that is."
        ) from error
    except Exception as error:  # connection errors come from several libraries
        raise _unreachable(name, error) from error


def ask(notice: str, name: str, agree: Agree | None) -> None:
    """Have a first download agreed to, on what terms included, or warn of it (FastVLMWarning); raises HubError if it is not."""
    notice += " Its weights are for research use only unless its licence says more."
    if agree is None:
        warnings.warn(notice, FastVLMWarning, stacklevel=5)
    elif not agree(notice):
        raise HubError(f"{name} was not downloaded; run 'fastvlm-mlx download {name}' or pass --yes, or try --model tiny.")


def _unreachable(name: str, error: Exception) -> HubError:
    return HubError(
        f"{name!r}: no such folder, not in the local cache, and the Hub cannot be reached ({type(error).__name__}); "
        "check the name and the connection, or use a folder you have, or the built-in model, 'tiny'."
    )


def _wanted(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in FILES)


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot has its config, tokenizer and weights, so that an interrupted download is taken up again."""
    from ..files.jsonfile import read_table
    from ..files.shards import INDEX

    words = (folder / "tokenizer.json").exists() or all((folder / name).exists() for name in ("vocab.json", "merges.txt"))
    if not words or not (folder / "config.json").exists():
        return False
    if (folder / INDEX).exists():
        weight_map = read_table(folder / INDEX).get("weight_map")
        return isinstance(weight_map, dict) and all((folder / str(file)).exists() for file in weight_map.values())
    return any(folder.glob("*.safetensors"))
