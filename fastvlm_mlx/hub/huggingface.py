"""A repository of the Hugging Face Hub -> the folder of its files in the Hub's own cache.

What is not complete there is downloaded.
"""

import errno
from fnmatch import fnmatch
from pathlib import Path

from ..errors import CheckpointError, FastVLMError, HubError, shown
from ..files.jsonfile import read_table
from ..files.paths import is_companion
from ..files.shards import INDEX
from .consent import Agree, ask

FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "added_tokens.json", "preprocessor_config.json", "processor_config.json", "LICENSE*",
)  # fmt: skip
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def find(name: str, revision: str | None, agree: Agree | None, cached_only: bool) -> Path:
    """The folder of a repository; raises HubError where the Hub cannot be reached or has no such model.

    `agree` and `cached_only` are those of `hub.find`.
    """
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
        raise HubError(f"{shown(name)}: no such folder, and not a Hub name ({error}); check `model`.") from error
    except (CheckpointError, OSError, ValueError):  # a cache that is damaged or cannot be read: fetch again
        pass
    if cached_only:
        raise HubError(
            f"{name!r}: no such folder, and not in the local cache; download it first: fastvlm-mlx download {name}"
        )
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
            raise HubError(
                f"{name!r}: no such folder, and the Hub has no such model open to you (HTTP {status})."
            ) from error
        raise HubError(
            f"{name!r}: no such folder, and the Hub answered with an error (HTTP {status}); try again."
        ) from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise _unreachable(name, error) from error
        raise HubError(
            f"{name!r} cannot be stored in the cache ({error.strerror}); make {error.filename or 'it'} writable, or "
            "set HF_HOME to a folder that is."
        ) from error
    except Exception as error:  # connection errors come from several libraries
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> HubError:
    return HubError(
        f"{name!r}: no such folder, not in the local cache, and the Hub cannot be reached ({type(error).__name__}); "
        "check the name and the connection, or use a folder you have, or the built-in model, 'tiny'."
    )


def _wanted(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in FILES)


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot has config, tokenizer and weights; one that has not is downloaded again."""
    has_tokenizer = (folder / "tokenizer.json").exists() or all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    )
    if not has_tokenizer or not (folder / "config.json").exists():
        return False
    if (folder / INDEX).exists():
        weight_map = read_table(folder / INDEX).get("weight_map")
        return isinstance(weight_map, dict) and all((folder / str(file)).exists() for file in weight_map.values())
    return any(not is_companion(path.name) for path in folder.glob("*.safetensors"))
