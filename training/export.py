"""Write a trained state as a checkpoint folder in Apple's LLaVA layout, the tower in training form.

``python -m training.export --run runs/tiny --out tiny-checkpoint`` reads the run folder's ``state.pt`` and tokenizer
and writes ``config.json``, ``model.safetensors`` (float32) and the tokenizer's files, as ``convert/`` accepts them;
``read_checkpoint`` is the way back into the PyTorch model. Key names: apple/ml-fastvlm, its ``mobileclip`` tower and
``llava/model``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import FastVLM, ModelConfig
from training.tokenizer import END, END_OF_TEXT

TOWER = "model.vision_tower.vision_tower.model."
STAGE = (0, 2, 4, 7, 10)  # Apple's numbers in ``network`` of stages 0 to 4,
DOWNSAMPLE = (None, 1, 3, 5, 8)  # of the downsampling before each,
POSITION = (None, None, None, 6, 9)  # and of the position encoding before each
ROWS: tuple[tuple[str, str], ...] = (  # words of timm's names and Apple's for them
    ("conv_kxk", "rbr_conv"),
    ("conv_scale", "rbr_scale"),
    ("identity", "rbr_skip"),
    ("large_conv", "lkb_origin"),
    ("pos_enc", "pe"),
    ("mlp", "convffn"),
    ("stem", "patch_embed"),
    ("final_conv", "conv_exp"),
)
SQUEEZE = {"fc1": "reduce", "fc2": "expand"}


def apple_name(name: str) -> str:
    """Apple's name, after ``TOWER``, of a tensor of timm's ``FastVit`` in training form."""
    if match := re.match(r"stages\.(\d)\.(blocks|downsample|pos_emb)\.(.*)", name):
        stage, part, rest = int(match[1]), match[2], match[3]
        number = {"blocks": STAGE, "downsample": DOWNSAMPLE, "pos_emb": POSITION}[part][stage]
        name = f"network.{number}.{rest}"
    name = re.sub(r"(layer_scale\w*)\.gamma$", r"\1", name)
    name = re.sub(r"\bse\.(fc[12])\b", lambda m: f"se.{SQUEEZE[m[1]]}", name)
    for theirs, apples in ROWS:
        name = re.sub(rf"\b{theirs}\b", apples, name)
    return name


def checkpoint_tensors(model: FastVLM) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name; ``lm_head`` is stored although tied, as Apple does."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("tower."):
            key = TOWER + apple_name(name.removeprefix("tower."))
        elif name.startswith("projector."):
            key = f"model.mm_{name}"
        else:
            key = name.removeprefix("decoder.")
        if key in tensors:
            raise ValueError(f"two tensors are named {key}")
        tensors[key] = tensor.detach().clone().contiguous()
    return tensors


def config_dict(config: ModelConfig, end: int, end_of_text: int) -> dict[str, Any]:
    """The checkpoint's ``config.json``: Apple's keys, and ``vision_config``, since these sizes are not Apple's."""
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "max_window_layers": config.layers,
        "mm_hidden_size": config.vision_width,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{config.image_size}",
        "model_type": "llava_qwen2",
        "license": "mit",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": config.max_positions,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vision_config": {"depths": list(config.depths), "widths": list(config.widths)},
        "vocab_size": config.vocab_size,
    }


def write_checkpoint(model: FastVLM, tokenizer: Path, out: Path) -> None:
    """Write the checkpoint folder ``out`` from a model and a folder of tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, out / file)
    added: dict[str, int] = json.loads((tokenizer / "added_tokens.json").read_text("utf-8"))
    config = config_dict(model.config, added[END], added[END_OF_TEXT])
    (out / "LICENSE").write_text((Path(__file__).parents[1] / "LICENSE").read_text("utf-8"), "utf-8")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(checkpoint_tensors(model), str(out / "model.safetensors"), metadata={"format": "pt"})


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a checkpoint written by ``write_checkpoint``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return ModelConfig(
        image_size=int(config["mm_vision_tower"].rsplit("_", 1)[1]),
        depths=tuple(config["vision_config"]["depths"]),
        widths=tuple(config["vision_config"]["widths"]),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        intermediate_size=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
    )


def read_checkpoint(folder: Path) -> FastVLM:
    """The model of a checkpoint written by ``write_checkpoint``, in eval mode."""
    model = FastVLM(read_config(folder))
    stored = load_file(str(folder / "model.safetensors"))
    expected = model.state_dict()
    keys = dict(zip(expected, checkpoint_tensors(model), strict=True))
    if missing := sorted(set(keys.values()) - set(stored)):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, among them {missing[:5]}")
    model.load_state_dict({name: stored[key] for name, key in keys.items()})
    return model.eval()


def read_state(path: Path) -> FastVLM:
    """The model of a training state, in eval mode."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model = FastVLM(ModelConfig.from_json(state["config"]))
    model.load_state_dict(state["model"])
    return model.eval()


def main() -> None:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--state", type=Path, help="another state than the run folder's state.pt")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    args = parser.parse_args()
    write_checkpoint(read_state(args.state or args.run / "state.pt"), args.run / "tokenizer", args.out)
    print(args.out)


if __name__ == "__main__":
    main()
