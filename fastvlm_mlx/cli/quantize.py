"""`fastvlm-mlx quantize`: a model -> a smaller one, with what each bit costs."""

import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .options import Out, TokenizerPath, Yes, agree_to_download

if TYPE_CHECKING:
    from ..config import Dtype
    from ..quantize import Recipe
    from ..storage.open import OpenModel

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="4bit or 8bit (decoder; embeddings and projector at 8), small (image encoder at 8, too), mixed (calibrated: bits "
        "go where they matter), plain (everything but the image encoder alike).",
    ),
]
Bits = Annotated[int | None, typer.Option(help="The decoder's bits instead of a recipe: 2, 3, 4, 5, 6 or 8.")]
Pictures = Annotated[
    str | None,
    typer.Option(
        "--pictures",
        help="A folder of pictures to calibrate and measure with, and perhaps a questions.jsonl "
        '({"image", "question", "answer"} a line). tiny has its own.',
    ),
]
Mode = Annotated[str | None, typer.Option(help="MLX's kind of scale: affine, mxfp4, mxfp8 or nvfp4. [default: affine]")]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale, in affine mode: 32, 64 or 128. [default: 64]")]


def quantize(
    model: Annotated[str, typer.Argument(help="A folder of any layout, a Hub name, or 'tiny'.", show_default=False)],
    out: Out,
    recipe: RecipeName = None,
    bits: Bits = None,
    mode: Mode = None,
    group_size: GroupSize = None,
    target_bits: Annotated[
        float | None, typer.Option(help="With mixed: bits per weight to spend, scales counted, 2.25 to 8.5. [default: 4.5]")
    ] = None,
    tower: Annotated[bool, typer.Option("--tower", help="Quantise the image encoder's matrices, too.")] = False,
    pictures: Pictures = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure the result against the source; its model card says how it did.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Store the rest as float32, float16 or bfloat16; by default as it is.")] = None,
    tokenizer_path: TokenizerPath = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that stands at --out.")] = False,
    yes: Yes = False,
) -> None:
    """Write a model with fewer bits per weight.

    Without options: the recipe 4bit. An interrupted calibration goes on where it was when the same command is given again.

    Example: fastvlm-mlx quantize fastvlm-0.5b --out fastvlm-0.5b-4bit --recipe mixed --pictures photos --report
    """
    from ..hub.find import find, find_tokenizer
    from ..quantize import choose

    smaller = choose(recipe, bits=bits, mode=mode, group_size=group_size, target_bits=target_bits, tower=tower)
    tokenizer = find_tokenizer(tokenizer_path)
    target = target_of(out)
    source = find(model, agree=agree_to_download(yes))
    opened = open_source(model, source, tokenizer)
    kind = cast("Dtype | None", dtype)  # checked by run
    run(opened, source, target, smaller, dtype=kind, pictures=pictures, report=report, force=force)


def chosen(recipe: str | None, bits: int | None, mode: str | None, group_size: int | None, pictures: str | None) -> "Recipe | None":
    """The recipe that options of another command ask for, None where they ask for none."""
    from ..errors import OptionError
    from ..quantize import choose

    if recipe is None and bits is None and mode is None:
        if group_size is not None or pictures is not None:
            raise OptionError("--group-size and --pictures belong to quantising; give --recipe, --bits or --mode as well.")
        return None
    return choose(recipe, bits=bits, mode=mode, group_size=group_size)


def open_source(name: str, folder: Path, tokenizer: Path | None, **how: Any) -> "OpenModel":
    """The model in `folder`, called as it was asked for: its Hub name, "tiny", or its folder's name; `how` see `open_foreign`."""
    from ..hub.find import BUILT_IN, HUB_NAME
    from ..vlm import open_folder

    known = name == BUILT_IN or (HUB_NAME.fullmatch(name) and folder != Path(name))
    name = name if known else folder.resolve().name
    if any(value is not None for value in how.values()):
        from ..convert import open_foreign

        return open_foreign(folder, name, tokenizer, **how)
    return open_folder(folder, name, tokenizer)


def target_of(out: str) -> Path:
    """The path of --out; raises OutputError where it is empty."""
    from ..errors import OutputError

    target = Path(os.path.expanduser(out))  # noqa: PTH111
    if target == Path():
        raise OutputError("The path of the output is empty; give the name of a new folder to --out.")
    return target


def run(
    opened: "OpenModel",
    source: Path,
    target: Path,
    recipe: "Recipe",
    *,
    dtype: "Dtype | None" = None,
    pictures: str | None = None,
    report: bool = False,
    force: bool = False,
) -> None:
    """Quantise with a progress bar, and say what was done and what was left alone."""
    from ..calibrate import pipeline as folders
    from ..calibrate.examples import questions_for
    from ..calibrate.report import table

    needed = report or recipe.target_bits is not None
    questions = questions_for(opened.name, Path(pictures) if pictures else None) if needed else []
    phases = ["Answering"] * needed + ["Calibrating"] * (recipe.target_bits is not None) + ["Writing"]
    with typer.progressbar(length=1000, label="Quantising", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def progress(label: str, done: int, total: int) -> None:
            bar.label = label
            share = (phases.index(label) + done / total) / len(phases)
            bar.update(int(1000 * share) - bar.pos)

        try:
            result = folders.quantize(
                opened, source, target, recipe, dtype=dtype, questions=questions, measure=report, force=force, progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            state = folders.state_file(target)
            if state.exists():
                print(
                    f"\nInterrupted; what was found is kept in {state}, and the same command goes on from there.", file=sys.stderr
                )
            raise
    counts: dict[str, int] = defaultdict(int)
    for settings in result.config.quantization.values():
        counts[f"{settings.bits} bits in groups of {settings.group_size} ({settings.mode})"] += 1
    for description, count in sorted(counts.items()):
        print(f"{count} layers: {description}", file=sys.stderr)
    reasons: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path, reason in result.left.items():
        reasons[reason][re.sub(r"\.\d+", ".*", path)] += 1
    for reason, paths in reasons.items():
        names = ", ".join(path if count == 1 else f"{path} ({count})" for path, count in sorted(paths.items()))
        print(f"{sum(paths.values())} layers left alone, {reason}: {names}", file=sys.stderr)
    if result.qualities:
        print(table(result.qualities))
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e6:,.1f} MB. Try: fastvlm-mlx generate --model {target} --image PICTURE", file=sys.stderr)
