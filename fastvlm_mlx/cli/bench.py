"""`fastvlm-mlx bench`: times and memory of each stage on this machine."""

import os
import sys
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, Adapter, Yes, agree_to_download, pictures_named


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", "--model-path", help="A folder, a Hub name or 'tiny'; repeatable.", show_default=False
        ),
    ] = None,
    random: Annotated[
        list[str] | None,
        typer.Option(
            help="Random weights of a published size instead: 0.5b, 1.5b, 7b (or small); nothing is downloaded."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --random, keep only this many decoder layers.")] = None,
    bits: Annotated[int | None, typer.Option(help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Compute in float32, float16 or bfloat16 instead of the default.")
    ] = None,
    resolution: Annotated[
        list[int] | None, typer.Option(help="Side in pixels, a multiple of 64 from 64 to 4096; repeat to compare.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            "--image-file",
            help="A picture instead of a made 12-megapixel JPEG; several may follow one another.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="How many pictures to make, all shown in one prompt.", min=1)] = 1,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")] = "Describe the image.",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--max-new-tokens", help="Tokens to generate.", min=2)
    ] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that count; the median is shown.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before those, not counted.", min=0)] = 1,
    quality: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Measure how near model B answers to model A; B 'recipes' stands for A quantised by every recipe.",
            metavar="A B",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--pictures", help="With --quality: a folder of pictures, and perhaps a questions.jsonl. tiny has its own."
        ),
    ] = None,
    chart: Annotated[
        str | None, typer.Option(help="With --quality: write quality against size as an SVG picture.")
    ] = None,
    adapter: Adapter = None,
    yes: Yes = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with every figure and the machine.")
    ] = False,
) -> None:
    """Measure load, preprocessing, vision, prefill, first token, decoding and peak memory on this machine.

    Example: fastvlm-mlx bench --random 0.5b --resolution 512 --resolution 1024
    """
    from json import dumps

    from ..config import check_dtype, check_resolution
    from ..decoding.engine import Engine
    from ..diagnostics import bench as benches
    from ..diagnostics.machine import machine
    from ..diagnostics.random_model import open_random
    from ..errors import OptionError
    from ..inputs.image import Source
    from ..quantize.recipes import check_bits

    if quality is None and (folder or chart):
        raise OptionError("--pictures and --chart belong to --quality A B; give it as well.")
    if quality is not None:
        _compare(*quality, folder, chart, yes, json)
        return
    if layers is not None and not random:
        raise OptionError("--layers was given without --random; a model that is read keeps all its layers.")
    if image and images > 1:
        raise OptionError("--images was given together with --image; repeat --image for several pictures.")
    check_bits(bits)
    check_dtype(dtype)
    for size in resolution or ():
        check_resolution(size)
    pictures: list[Source] = pictures_named(image) or [benches.made_photo(seed=number) for number in range(images)]
    names = model or ([] if random else [os.environ.get("FASTVLM_MODEL", DEFAULT_MODEL)])
    engines = [Engine.open(name, agree=agree_to_download(yes)) for name in names]
    engines += [Engine(open_random(name, layers)) for name in random or []]
    results = benches.measure_all(
        engines, pictures, resolutions=resolution or (), prompt=prompt, bits=bits,
        dtype=dtype,  # type: ignore[arg-type]  # checked there
        max_tokens=max_tokens, rounds=rounds, warmup=warmup, adapter=adapter,
        progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    here = machine()
    if json:
        print(dumps(benches.to_dict(here, results), ensure_ascii=False))
        return
    print(here.describe())
    print()
    print(benches.table(results))


def _compare(first: str, second: str, pictures: str | None, chart: str | None, yes: bool, json: bool) -> None:
    """Print the second model's figures against the first's, as a table or as JSON, and draw the chart."""
    from dataclasses import asdict
    from pathlib import Path

    from ..calibrate import report
    from ..calibrate.comparison import compare
    from ..diagnostics.machine import machine
    from ..files import paths

    results = compare(
        first, second, pictures=Path(pictures) if pictures else None, agree=agree_to_download(yes),
        say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if chart:
        report.write_picture(Path(paths.local(chart)), results, f"What quantising costs: {first}")
    print(report.to_json(results, machine=asdict(machine())) if json else report.table(results))
