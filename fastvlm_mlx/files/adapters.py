"""Folders that hold only part of a model: an adapter (LoRA), or the projector that a first stage of training saves."""

from pathlib import Path

from ..errors import CheckpointError, about_its_path, listed, shown, warn
from .jsonfile import read_table

ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")
ADAPTER_PREFIXES = ("adapter", "non_lora_trainables")  # beginnings of the names of an adapter's weight files
PROJECTOR_FILE = "mm_projector.bin"


USE_ADVICE = "load the model it was made for and give this folder as `adapter`"


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return not any(path.suffix in WEIGHT_SUFFIXES and path.name.startswith("model") for path in folder.iterdir())


@about_its_path
def check_whole(folder: Path) -> None:
    """Raise CheckpointError for a folder with an adapter in it, or one that holds a projector and nothing else.

    An adapter is refused beside a whole model too, because it would be silently left out. A subfolder with an adapter
    in it counts, as trainers save their checkpoints in subfolders.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return  # whoever reads the folder's files says so
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    adapter = [name for name in weights if name.startswith(ADAPTER_PREFIXES)]
    models = [
        name for name in weights if name not in adapter and name.startswith(("model", "pytorch_model", "consolidated"))
    ]
    if adapter or ADAPTER_CONFIG in names:
        what = f"an adapter{_described(folder)}"
        if models:
            files = listed([name for name in names if name in adapter or name == ADAPTER_CONFIG])
            raise CheckpointError(
                f"{folder}: {what} lies beside a model's weights, so it is not clear what is meant; move {files} to "
                "a folder "
                "of its own, and give that as `adapter` to use the model with it."
            )
        raise CheckpointError(f"{folder}: {what}, not a whole model; {USE_ADVICE}.")
    inner = sorted(path.name for path in folder.iterdir() if _is_adapter(path))
    if inner and models:
        warn(f"{folder}: the adapter in {listed(inner)} is not applied; to use it, give its folder as `adapter`.")
    if inner and not weights:
        raise CheckpointError(
            f"{folder}: no weights in it but an adapter in {listed(inner)}, not a whole model; load the model it was "
            "made "
            "for and give the folder of the adapter as `adapter`."
        )
    if weights == [PROJECTOR_FILE]:
        raise CheckpointError(
            f"{folder}: the projector of a model alone ({PROJECTOR_FILE}), as the first stage of training leaves it; "
            "use the whole model."
        )


def _is_adapter(folder: Path) -> bool:
    """Whether this is a folder, not hidden, with an adapter's settings in it."""
    return not folder.name.startswith(".") and (folder / ADAPTER_CONFIG).is_file()


def _described(folder: Path) -> str:
    """An adapter's method and base model, as its settings name them, in brackets; "" where they cannot be read."""
    try:
        settings = read_table(folder / ADAPTER_CONFIG)
    except CheckpointError:
        return ""
    method, base = settings.get("peft_type") or settings.get("fine_tune_type"), settings.get("base_model_name_or_path")
    said = [
        str(method) if isinstance(method, str) else "",
        f"for {shown(base)}" if isinstance(base, str) and base else "",
    ]
    return f" ({' '.join(filter(None, said))})" if any(said) else ""
