"""`fastvlm-mlx convert`: a checkpoint as published -> a folder of ours, or of transformers'."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError, counted
from . import exporting, quantising
from .messages import BAR_STEPS, bar, note
from .options import Out, TokenizerPath, Yes, agree_to_download


def convert(
    folder: Annotated[
        str, typer.Argument(help="A checkpoint of any layout: a folder or a Hub name.", show_default=False)
    ],
    out: Out,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, float16 or bfloat16; by default as the checkpoint does.")
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="What to write: 'mlx', a folder for this program; 'transformers', one for that library; 'coreml', the "
            "image encoder as a package (.mlpackage) for the Neural Engine; 'onnx', the whole model for onnxruntime "
            "and transformers.js; 'mlx-vlm', for that program and mlx-swift-lm; 'mlx-lm', the decoder alone; "
            "of an adapter, 'peft'."
        ),
    ] = "mlx",
    layout: Annotated[
        str | None,
        typer.Option(
            help="Treat the checkpoint as llava, llava-training, transformers, transformers-training, mlx-vlm or "
            "apple-mlx instead of recognising its layout."
        ),
    ] = None,
    vision_from: Annotated[
        str | None,
        typer.Option(
            help="Take the image encoder from this folder or Hub name; for Apple's MLX exports, which lack it."
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="Make pictures square by black bars ('pad') or by cutting ('crop'); by default as the checkpoint says."
        ),
    ] = None,
    recipe: quantising.RecipeName = None,
    bits: quantising.Bits = None,
    mode: quantising.Mode = None,
    group_size: quantising.GroupSize = None,
    pictures: quantising.Pictures = None,
    resolution: exporting.PackageResolution = None,
    precision: exporting.Precision = None,
    tower_bits: exporting.TowerBits = None,
    input_kind: exporting.Input = None,
    with_projector: exporting.WithProjector = False,
    target_system: exporting.Target = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", help="Add what fine-tuning learned to the weights; quantised layers come out unquantised."
        ),
    ] = None,
    tokenizer_path: TokenizerPath = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that stands at --out.")] = False,
    upload: Annotated[
        str | None,
        typer.Option(help="Then publish the folder on the Hub as OWNER/NAME; needs HF_TOKEN, or 'hf auth login'."),
    ] = None,
    yes: Yes = False,
) -> None:
    """Convert a checkpoint, once, into a folder that loads faster.

    Everything constant is folded (batch norms, layer scales, branches) and laid out for speed. The result is written
    atomically. With --recipe, --bits or --mode it is quantised as well, as 'fastvlm-mlx quantize' does.

    Example: fastvlm-mlx convert llava-fastvithd_0.5b_stage3 --out fastvlm-0.5b

    With --to it is written for other programs (docs/export.md):
    fastvlm-mlx convert fastvlm-0.5b --to coreml --out fastvithd.mlpackage
    """
    from ..config import check_dtype
    from ..convert import check_fit, check_layout, to_transformers
    from ..convert import convert as to_mlx
    from ..convert.fuse import fuse, unpacked
    from ..decoding.adapters import find_adapter
    from ..decoding.loading import open_model
    from ..export.targets import check_takes
    from ..files.adapters import holds_adapter
    from ..hub.find import find, find_tokenizer
    from ..hub.publish import check, publish
    from ..quantize.recipes import choose_if_asked
    from ..storage.place import target_of

    given = {
        "dtype": dtype, "layout": layout, "vision_from": vision_from, "fit": fit, "recipe": recipe, "bits": bits,
        "mode": mode, "group_size": group_size, "pictures": pictures, "upload": upload, "resolution": resolution,
        "precision": precision, "tower_bits": tower_bits, "input": input_kind, "with_projector": with_projector,
        "target": target_system,
    }  # fmt: skip
    check_takes(to, given)
    check_dtype(dtype)
    check_layout(layout)
    check_fit(fit)
    export = exporting.prepare(to, given)
    smaller = None
    if export is None:
        smaller = choose_if_asked(recipe, bits=bits, mode=mode, group_size=group_size, pictures=pictures)
    tokenizer, target = find_tokenizer(tokenizer_path), target_of(out)
    if upload is not None:
        check(upload)
    found = find(folder, agree=agree_to_download(yes))
    if holds_adapter(found.folder):
        _convert_adapter(found.folder, target, to, force)
        return
    if to == "peft":
        raise OptionError(
            f"--to peft is for an adapter's folder, and {folder} is a model's; name what tune has written."
        )
    changes = None if adapter is None else find_adapter(adapter, open_model(found).config)
    tower = None if vision_from is None else find(vision_from, agree=agree_to_download(yes)).folder
    if export is not None:
        opened = open_model(found, tokenizer, name=found.title, layout=layout, vision_from=tower, fit=fit)
        opened = opened if changes is None else fuse(opened, changes)
        exporting.run(export, opened, found.folder, target, force=force)
        return
    if smaller is not None:
        opened = open_model(found, tokenizer, name=found.title, layout=layout, vision_from=tower, fit=fit)
        if changes is not None:
            opened = unpacked(fuse(opened, changes))
        quantising.run(
            opened, found.folder, target, smaller, pictures=pictures, force=force,
            dtype=dtype,  # type: ignore[arg-type]  # checked
            report=changes is not None and (pictures is not None or opened.built_in),
        )  # fmt: skip
        if upload is not None:
            print(f"Published: {publish(target, upload)}", file=sys.stderr)
        return
    run = to_mlx if to == "mlx" else to_transformers
    with bar("Converting") as drawn:
        run(
            found.folder,
            target,
            name=found.title,
            dtype=dtype,  # type: ignore[arg-type]  # checked by convert
            tokenizer=tokenizer,
            layout=layout,
            vision_from=tower,
            fit=fit,  # type: ignore[arg-type]  # checked by convert
            force=force,
            say=lambda name: note(f"Layout: {name}"),
            progress=lambda done, total: drawn.update(done * BAR_STEPS // total - drawn.pos),
            adapter=changes,
        )
    size = sum(file.stat().st_size for file in target.iterdir())
    if upload is not None:
        print(f"Published: {publish(target, upload)}", file=sys.stderr)
    print(f"{out}: {size / 1e9:.2f} GB. Try: fastvlm-mlx generate --model {out} --image PICTURE", file=sys.stderr)


def _convert_adapter(folder: Path, target: Path, to: str, force: bool) -> None:
    """An adapter's folder into another library's, or another library's into ours."""
    from ..convert.adapters import open_foreign_adapter
    from ..convert.peft import to_peft
    from ..storage.adapter import is_adapter, read_adapter, write_adapter
    from ..storage.place import new_folder

    ours = is_adapter(folder)
    if to not in ("mlx", "peft") or (ours and to == "mlx"):
        raise OptionError(
            f"{folder} holds an adapter, not a model; give --to peft for PEFT's form"
            f"{'' if ours else ', or leave it out for ours'}, or convert its model with --adapter {folder}."
        )
    found = read_adapter(folder) if ours else open_foreign_adapter(folder)
    if to == "peft":
        to_peft(found, target, force=force)
    else:
        with new_folder(target, found.nbytes, force) as partial:
            write_adapter(partial, found)
    print(f"{target}: an adapter of {counted(len(found.config.targets), 'layer')}.", file=sys.stderr)
