"""The shared part of `quantize` and `convert --bits`: options, progress bar, and the report of the result."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .messages import BAR_STEPS, bar, note

if TYPE_CHECKING:
    from ..config import Dtype
    from ..quantize.recipes import Recipe
    from ..storage.open import OpenModel

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="4bit or 8bit (decoder; embeddings and projector at 8), small (image encoder at 8, too), mixed "
        "(calibrated: bits go where they matter), plain (everything but the image encoder alike).",
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
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale, in affine mode: 32, 64 or 128. [default: 64]")
]


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
    """Quantise with a progress bar, and print what was done and what was left alone."""
    from ..calibrate import pipeline
    from ..calibrate.report import table

    with bar("Quantising") as drawn:

        def progress(label: str, share: float) -> None:
            drawn.label = label
            drawn.update(int(BAR_STEPS * share) - drawn.pos)

        try:
            result = pipeline.quantize(
                opened, source, target, recipe, dtype=dtype, pictures=Path(pictures) if pictures else None,
                measure=report, force=force, progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            state = pipeline.state_file(target)
            if state.exists():
                note(f"Interrupted; what was found is kept in {state}, and the same command continues from there.")
            raise
    for line in result.lines():
        print(line, file=sys.stderr)
    if result.qualities:
        print(table(result.qualities))
    size = sum(file.stat().st_size for file in target.iterdir())
    print(
        f"{target}: {size / 1e6:,.1f} MB. Try: fastvlm-mlx generate --model {target} --image PICTURE", file=sys.stderr
    )
