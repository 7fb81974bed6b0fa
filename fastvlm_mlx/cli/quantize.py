"""`fastvlm-mlx quantize`: a model -> a smaller one, and a report of what that costs."""

from typing import TYPE_CHECKING, Annotated, cast

import typer

from .options import Out, TokenizerPath, Yes, agree_to_download
from .quantising import Bits, GroupSize, Mode, Pictures, RecipeName, run

if TYPE_CHECKING:
    from ..config import Dtype


def quantize(
    model: Annotated[str, typer.Argument(help="A folder of any layout, a Hub name, or 'tiny'.", show_default=False)],
    out: Out,
    recipe: RecipeName = None,
    bits: Bits = None,
    mode: Mode = None,
    group_size: GroupSize = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="With mixed: bits per weight to spend, scales counted, 2.25 to 8.5. [default: 4.5]"),
    ] = None,
    tower: Annotated[bool, typer.Option("--tower", help="Quantise the image encoder's matrices, too.")] = False,
    pictures: Pictures = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure the result against the source; its model card says how it did.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Store the rest as float32, float16 or bfloat16; by default as it is.")
    ] = None,
    tokenizer_path: TokenizerPath = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that stands at --out.")] = False,
    yes: Yes = False,
) -> None:
    """Write a model with fewer bits per weight.

    Without options, the recipe is 4bit. An interrupted calibration continues when the same command is given again.

    Example: fastvlm-mlx quantize fastvlm-0.5b --out fastvlm-0.5b-4bit --recipe mixed --pictures photos --report
    """
    from ..config import check_dtype
    from ..decoding.loading import open_model
    from ..hub.find import find, find_tokenizer
    from ..quantize.recipes import choose
    from ..storage.place import target_of

    smaller = choose(recipe, bits=bits, mode=mode, group_size=group_size, target_bits=target_bits, tower=tower)
    check_dtype(dtype)
    tokenizer, target = find_tokenizer(tokenizer_path), target_of(out)
    found = find(model, agree=agree_to_download(yes))
    opened = open_model(found, tokenizer, name=found.title)
    checked = cast("Dtype | None", dtype)
    run(opened, found.folder, target, smaller, dtype=checked, pictures=pictures, report=report, force=force)
