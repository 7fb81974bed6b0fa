"""The texts of a converted folder: a model card, and the licence of the weights it was made from."""

import json
from pathlib import Path

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import MAX_SHOWN_CHARS, counted, shown
from fastvlm_mlx.hub.licence import AGREEMENT, APPLE, ATTRIBUTION, FILES
from fastvlm_mlx.hub.names import HUB_NAME

# Those the Hub knows by name, of the ones FastVLM weights may come under; any other is "other" and named beside it.
HUB_LICENCES = (
    APPLE,
    "mit",
    "apache-2.0",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
)
TERMS = f"""{ATTRIBUTION}

The checkpoint this folder was converted from carried no copy of the agreement. It is published with Apple's FastVLM:
{AGREEMENT}
Research purposes only, no commercial use, and a copy or a derivative of the weights, such as this folder, is passed on
with the agreement and a statement of what was changed.
"""


def licence_text(folder: Path, config: ModelConfig) -> str:
    """The licence in the source folder, or else where to find it."""
    for name in FILES:
        path = folder / name
        if path.is_file() and _is_own(path) and path.stat().st_size < 1_000_000:
            return path.read_text(encoding="utf-8", errors="replace")
    return TERMS if config.source.license == APPLE else f"{config.source.license}\n"


def _is_own(path: Path) -> bool:
    """Whether a file lies in its folder, or in the Hub's cache that its folder links to.

    A link to any other file would pass that file on with the model.
    """
    home, real = path.parent.resolve(), path.resolve()
    return real.parent == home or real.parent == home.parent.parent / "blobs"


def model_card(
    config: ModelConfig, *, quality: str | None = None, scaled: bool = False, adapter: str | None = None
) -> str:
    """README.md of a converted folder.

    `quality` is a Markdown report of what quantising cost, if that was measured; `scaled` says that activation-aware
    scales were folded in, `adapter` which adapter was.
    """
    vision, text, source = config.vision, config.text, config.source
    report = f"\n## Quality\n\n{quality.strip()}\n" if quality else ""
    return f"""---
{_front_matter(config, "mlx")}---
# {_plain(Path(source.name).name or "FastVLM")} for MLX

FastVLM, converted by fastvlm-mlx from the layout "{source.layout}".

    fastvlm-mlx generate --model FOLDER --image photo.jpg --prompt "Describe the image."

| part | sizes |
|---|---|
| image | {config.image.size} x {config.image.size} pixels, fitted by "{config.image.fit}" |
| FastViTHD | blocks {", ".join(map(str, vision.depths))}; channels {", ".join(map(str, vision.widths))} |
| Qwen2 | {text.num_hidden_layers} layers of width {text.hidden_size}, vocabulary {text.vocab_size} |
| stored as | {_stored(config)} |
{report}
## Changes

{_changes(config, scaled, adapter)}

## Licence

{_terms(config)}; see LICENSE.
"""


def transformers_card(config: ModelConfig, quantised: int = 0) -> str:
    """README.md of a folder written for transformers, from a model with `quantised` quantised layers."""
    coarse = (
        f"{quantised} layers had been quantised and hold the values that were left of their weights. "
        if quantised
        else ""
    )
    return f"""---
{_front_matter(config, "transformers")}---
# {_plain(Path(config.source.name).name or "FastVLM")} for transformers

FastVLM, written by fastvlm-mlx for transformers' `FastVlmForConditionalGeneration`, from the layout
"{config.source.layout}".

## Changes

Batch norms and layer scales of the image encoder are folded into neighbouring weights, so that those that are left
change nothing; parallel branches (where there were any) are merged; values are rounded to {config.dtype}.
{coarse}Nothing was trained.

## Licence

{_terms(config)}; see LICENSE.
"""


def onnx_card(config: ModelConfig, precision: str) -> str:
    """README.md of a folder of ONNX graphs whose matrices are stored in this precision."""
    return f"""---
{_front_matter(config, "transformers.js")}---
# {_plain(Path(config.source.name).name or "FastVLM")} for ONNX

FastVLM, written by fastvlm-mlx as three graphs for onnxruntime and transformers.js (`llava_qwen2`), from the layout
"{config.source.layout}".

## Changes

Batch norms, layer scales and branches of the image encoder are folded into neighbouring weights; matrices are stored
in {precision}. Nothing was trained.

## Licence

{_terms(config)}; see LICENSE.
"""


def mlx_card(config: ModelConfig, program: str, bits: int | None) -> str:
    """README.md of a folder for one of MLX's other programs, its decoder quantised to so many bits."""
    stored = f"values are rounded to {config.dtype}" + (f", the decoder's matrices to {bits} bits" if bits else "")
    what = "The decoder of FastVLM, for text alone" if program == "mlx-lm" else "FastVLM"
    return f"""---
{_front_matter(config, "mlx")}---
# {_plain(Path(config.source.name).name or "FastVLM")} for {program}

{what}, written by fastvlm-mlx for {program}, from the layout "{config.source.layout}".

## Changes

What is constant in the image encoder is folded into neighbouring weights, beside norms and scales that change nothing;
{stored}. Nothing was trained.

## Licence

{_terms(config)}; see LICENSE.
"""


def _terms(config: ModelConfig) -> str:
    apples = config.source.license == APPLE
    return f"{ATTRIBUTION} Research purposes only ({AGREEMENT})" if apples else _plain(config.source.license)


def _front_matter(config: ModelConfig, library: str) -> str:
    """The card's YAML, which the Hub reads; strings from outside are written as JSON, which is valid YAML."""
    source = config.source
    bits = sorted({f"{layer.bits}-bit" for layer in config.quantization.values()})
    entries = {"library_name": library, "pipeline_tag": "image-text-to-text", "license": source.license}
    if source.license not in HUB_LICENCES:
        entries |= {"license": "other", "license_name": json.dumps(source.license), "license_link": "LICENSE"}
    elif source.license == APPLE:
        entries |= {"license_name": APPLE, "license_link": "LICENSE"}
    if HUB_NAME.fullmatch(source.name):
        entries["base_model"] = source.name
        if bits:
            entries["base_model_relation"] = "quantized"
    entries["tags"] = f"[{', '.join([library, 'fastvlm', 'fastvlm-mlx', *bits])}]"
    return "".join(f"{key}: {value}\n" for key, value in entries.items())


def _plain(text: str) -> str:
    """A name or licence from outside in running text, quoted where it is not one line of a usual length."""
    return text if text.isprintable() and len(text) <= MAX_SHOWN_CHARS else shown(text)


def _stored(config: ModelConfig) -> str:
    """The dtype of the weights, and how many layers have fewer bits."""
    bits = [layer.bits for layer in config.quantization.values()]
    return ", ".join(
        [config.dtype, *(f"{counted(bits.count(each), 'layer')} in {each} bits" for each in sorted(set(bits)))]
    )


def _changes(config: ModelConfig, scaled: bool, adapter: str | None) -> str:
    count = len(config.quantization)
    quantised = f"{counted(count, 'layer')} {'was' if count == 1 else 'were'} quantised. " if count else ""
    if scaled:
        quantised = f"Activation-aware scales (AWQ) were folded into neighbouring weights, and {quantised}"
    trained = (
        "Nothing was trained." if adapter is None else f"What fine-tuning learned was added to the weights ({adapter})."
    )
    return f"""\
Batch norms and layer scales of the image encoder were folded into neighbouring weights, parallel branches (where there
were any) merged, 1x1 convolutions stored as linear layers, query, key and value projections (and gate and up) stacked,
and values rounded to {config.dtype}. {quantised}{trained}"""
