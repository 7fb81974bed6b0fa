"""What a model can be written as, and which options each target takes."""

from collections.abc import Callable, Mapping

from ..errors import OptionError, listed, shown

Progress = Callable[[str, float], None]  # what is being done, and how much of everything is, 0-1

QUANTISING = ("recipe", "bits", "mode", "group_size")
READING = ("layout", "vision_from", "fit")  # how a checkpoint of another layout is read
PACKAGE = ("resolution", "precision", "tower_bits", "input", "with_projector", "target", "pictures")

# By target, the options it takes beside the model, the place, the tokenizer and `force`.
TARGETS: dict[str, tuple[str, ...]] = {
    "mlx": (*READING, *QUANTISING, "dtype", "pictures", "upload"),
    "transformers": (*READING, "dtype", "upload"),
    "coreml": (*READING, *PACKAGE),
    "onnx": (*READING, "precision"),
    "mlx-vlm": (*READING, "dtype", "bits", "group_size"),
    "mlx-lm": (*READING, "dtype", "bits", "group_size"),
    "peft": (),  # of an adapter
}


def check_target_name(to: str) -> None:
    """Raise OptionError unless it is one of TARGETS."""
    if to not in TARGETS:
        raise OptionError(f"`to` is {shown(to)}, expected one of {listed(TARGETS)}.")


def check_takes(to: str, given: Mapping[str, object]) -> None:
    """Raise OptionError for an option that is given (neither None nor False) and that the target does not take."""
    check_target_name(to)
    for name, value in given.items():
        if value is None or value is False or name in TARGETS[to]:
            continue
        takers = [target for target, options in TARGETS.items() if name in options]
        raise OptionError(f"`{name}` is not for `to={to!r}` but for {listed(takers)}; leave one of them out.")
