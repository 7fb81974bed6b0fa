"""The PyTorch originals with random weights, and their weights in Apple's layout: what every parity test starts from.

Layer scales, norms and batch-norm statistics are moved away from their initial values, so that a forgotten fold shows.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config

FULL = {"depths": (2, 12, 24, 4, 2), "widths": (96, 192, 384, 768, 1536)}
SMALL = {"depths": (1, 2, 1, 1, 2), "widths": (32, 64, 128, 256, 512)}
ODD = {"depths": (2, 1, 1, 2, 1), "widths": (16, 48, 96, 96, 192)}  # widened by 3, 2, 1 and 2

TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
}


Original = Any  # a FastVlmForConditionalGeneration; PyTorch's types leave open what the attributes of a module are


def build(
    vision: dict[str, Any], *, seed: int = 0, tied: bool = True, training: bool = False, vocab: int = 512, **text: Any
) -> Original:
    """transformers' FastVLM of the given sizes, in evaluation mode; `training` builds the tower with its branches."""
    torch.manual_seed(seed)
    sizes = {**TEXT, **text}
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 2 * vision["widths"][-1],
            "model_args": {"inference_mode": not training, "layers": vision["depths"], "embed_dims": vision["widths"]},
        },
        text_config=Qwen2Config(
            vocab_size=vocab,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=tied,
            max_position_embeddings=2048,
            **sizes,
        ).to_dict(),
        tie_word_embeddings=tied,
        image_token_index=vocab - 1,
    )
    model = FastVlmForConditionalGeneration(config).eval()
    randomise(model)
    if tied:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights whose activations keep their size from layer to layer, and nothing left at zero or one."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn_like(tensor)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand_like(tensor))
        elif "layer_scale" in name:
            tensor.copy_(0.3 + 0.1 * noise)
        elif tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_(1 + 0.1 * noise)
        elif tensor.ndim == 1 or "embed_tokens" in name or "lm_head" in name:
            tensor.copy_(0.05 * noise)
        else:
            fan_in = tensor[0].numel()
            tensor.copy_(noise / fan_in**0.5)


def apple_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names -> Apple's, for either form of the tower."""
    out = {}
    for name, tensor in state.items():
        if name.startswith("model.vision_tower.timm_model."):
            name = "model.vision_tower.vision_tower.model." + _tower_name(
                name.removeprefix("model.vision_tower.timm_model.")
            )
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
        out[name.replace("model.language_model.", "model.")] = tensor
    return out


def _tower_name(name: str) -> str:
    blocks, downsamples, positions = (0, 2, 4, 7, 10), (None, 1, 3, 5, 8), (None, None, None, 6, 9)
    if stage := re.match(r"stages\.(\d)\.(blocks|downsample|pos_emb)\.", name):
        number = {"blocks": blocks, "downsample": downsamples, "pos_emb": positions}[stage[2]][int(stage[1])]
        name = f"network.{number}." + name[stage.end() :]
        if stage[2] == "pos_emb":
            name = name.replace("pos_enc.", "pe.")
    for theirs, apples in (
        ("stem.", "patch_embed."),
        ("final_conv.", "conv_exp."),
        ("se.fc1", "se.reduce"),
        ("se.fc2", "se.expand"),
        (".mlp.", ".convffn."),
        (".gamma", ""),
        ("proj.0.reparam_conv", "proj.0.lkb_reparam"),
        ("large_conv", "lkb_origin"),
        ("conv_kxk", "rbr_conv"),
        ("conv_scale", "rbr_scale"),
        (".identity", ".rbr_skip"),
    ):
        name = name.replace(theirs, apples)
    return name


def save_apple(
    model: Original, folder: Path, tokenizer: Path, *, image_size: int = 128, shards: int = 1, **config: Any
) -> Path:
    """A checkpoint folder as Apple publishes it, plus the sizes of a tower that is not FastViTHD's."""
    folder.mkdir(parents=True, exist_ok=True)
    text = model.config.text_config
    weights = {name: tensor.contiguous().clone() for name, tensor in apple_names(model.state_dict()).items()}
    tower = model.model.vision_tower.timm_model
    widths = [stage.blocks[0].mlp.fc1.in_channels for stage in tower.stages]
    weights["model.vision_tower.vision_tower.model.head.proj"] = torch.zeros(2 * widths[-1], 768)
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {
        "model_type": "llava_qwen2",
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "hidden_act": "silu",
        "eos_token_id": json.loads((tokenizer / "added_tokens.json").read_text())["<|im_end|>"],
        "torch_dtype": "float32",
        "vision_config": {"depths": [len(stage.blocks) for stage in tower.stages], "widths": widths},
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": model.config.tie_word_embeddings,
        **{name: getattr(text, name) for name in TEXT},
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
