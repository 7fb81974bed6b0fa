"""A folder of ours -> a repository of the Hugging Face Hub, through huggingface_hub and its token."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FastVLMError, HubError, OptionError, shown
from .names import HUB_NAME

# The names that weights have in a folder of ours: any from an earlier conversion would be loaded beside, or instead of,
# the new.
WEIGHTS = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]


def check(name: str) -> None:
    """Check that a repository can be written to before anything is uploaded.

    Raises OptionError for a name that no repository can have, and HubError where there is no token or it is not
    accepted.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not said to be exported

    if not HUB_NAME.fullmatch(name):
        raise OptionError(f"{shown(name)} cannot be a repository's name; expected OWNER/NAME.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(f"{shown(name)} cannot be a repository's name; expected OWNER/NAME. {error}") from error
    if get_token() is None:
        raise HubError(
            f"{name} cannot be written to without a token; set HF_TOKEN, or run 'hf auth login', and try again."
        )
    with _explained(name):
        HfApi().whoami()


def publish(folder: Path, name: str) -> str:
    """Upload a folder's files to a repository, which is created where it does not exist, and return its address.

    Weights of an earlier conversion are removed in the same commit; other files stay. Raises HubError.
    """
    from huggingface_hub import HfApi

    with _explained(name):
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        message = "Converted by fastvlm-mlx"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=WEIGHTS)
    return str(address)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """A context manager that turns errors of the Hub and of the connection into a HubError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except FastVLMError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise HubError(f"{name} cannot be written to with this token (HTTP {status}); check its rights.") from error
        raise HubError(f"{name} was not published, the Hub answered with HTTP {status}; try again.") from error
    except Exception as error:  # connection errors come from several libraries
        raise HubError(
            f"{name} was not published, the Hub cannot be reached ({type(error).__name__}); check the connection and "
            "try again."
        ) from error
