"""What a converted folder says of itself: a model card, and the licence of the weights it was made from."""

from pathlib import Path

from fastvlm_mlx.config import ModelConfig

from .config_map import LICENSE

LICENSE_FILES = ("LICENSE_MODEL", "LICENSE", "LICENSE.txt", "LICENSE.md")
ATTRIBUTION = "Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model License Agreement."
TERMS = f"""{ATTRIBUTION}

The checkpoint this folder was converted from carried no copy of the agreement. It is published with Apple's FastVLM
(the file LICENSE_MODEL of github.com/apple/ml-fastvlm): research purposes only, no commercial use, and a copy or a
derivative of the weights, such as this folder, is passed on with the agreement and a statement of what was changed.
"""


def licence_text(folder: Path, config: ModelConfig) -> str:
    """The licence found in the source folder, or where to find it."""
    for name in LICENSE_FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size < 1_000_000:
            return path.read_text(encoding="utf-8", errors="replace")
    return TERMS if config.source.license == LICENSE else f"{config.source.license}\n"


def model_card(config: ModelConfig) -> str:
    """README.md of a converted folder."""
    vision, text, source = config.vision, config.text, config.source
    base = f"\nbase_model: {source.name}" if "/" in source.name else ""
    apples = source.license == LICENSE
    terms = f"{ATTRIBUTION} Research purposes only; see LICENSE." if apples else f"{source.license}; see LICENSE."
    return f"""---
library_name: mlx
pipeline_tag: image-text-to-text
license: {source.license}{base}
tags: [mlx, fastvlm, fastvlm-mlx]
---
# {Path(source.name).name} for MLX

FastVLM, converted by fastvlm-mlx from the layout "{source.layout}".

    fastvlm-mlx generate --model FOLDER --image photo.jpg --prompt "Describe the image."

| part | sizes |
|---|---|
| image | {config.image.size} x {config.image.size} pixels, fitted by "{config.image.fit}" |
| FastViTHD | blocks {", ".join(map(str, vision.depths))}; channels {", ".join(map(str, vision.widths))} |
| Qwen2 | {text.num_hidden_layers} layers of width {text.hidden_size}, vocabulary {text.vocab_size} |
| stored as | {config.dtype} |

## Changes

Batch norms and layer scales of the image encoder were folded into neighbouring weights, parallel branches (where there
were any) merged, 1x1 convolutions stored as linear layers, query, key and value projections (and gate and up) stacked,
and values rounded to {config.dtype}. Nothing was trained.

## Licence

{terms}
"""
