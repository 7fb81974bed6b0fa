"""Names of tensors as training saves them -> a layout's names, without the prefixes of wrappers around the model.

Data-parallel training, compilation and sharding put a component of their own before a name or into it, in any order and
more than once; a trainer's own module puts one before all names.
"""

from collections.abc import Iterable

from fastvlm_mlx.errors import CheckpointError, counted, listed, shown

WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "base_model",
}
ROOTS = {
    "model",
    "lm_head",
    "language_model",
    "vision_tower",
    "mm_projector",
    "multi_modal_projector",
}  # first components of the layouts' names
OUTER = ("model.model.", "model.lm_head.")  # of a model inside an attribute called `model`
MAX_WRAPPERS = 4  # nested wrappers
TOWER, INNER = (
    "model.vision_tower.vision_tower.",
    "model.",
)  # left out by trainers that build the image encoder themselves

# Signs of what is no plain model, in the components of a name.
ADAPTERS = {
    "lora_A",
    "lora_B",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
    "base_layer",
    "modules_to_save",
}
ADAPTERS |= {"lora_a", "lora_b"}  # MLX's
FOREIGN = {
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "quant_state": "bitsandbytes",
    "nested_absmax": "bitsandbytes", "SCB": "bitsandbytes", "weight_format": "bitsandbytes",
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors", "weight_scale": "compressed-tensors or FP8", "weight_scale_inv": "FP8",
}  # fmt: skip


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Stored name -> the layout's name, for all tensors; raises CheckpointError where two become the same."""
    clean = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    for _ in range(MAX_WRAPPERS):
        outer = _outer(clean.values()) if clean else ""
        clean = {name: inner.removeprefix(outer) for name, inner in clean.items()}
    if not any(inner.startswith(TOWER + INNER) for inner in clean.values()):
        clean = {
            name: inner.replace(TOWER, TOWER + INNER, 1) if inner.startswith(TOWER) else inner
            for name, inner in clean.items()
        }
    if len(set(clean.values())) != len(clean):
        first: dict[str, str] = {}
        twice = next((first[inner], name) for name, inner in clean.items() if first.setdefault(inner, name) != name)
        raise CheckpointError(f"{listed(twice)} are the same tensor stored under two names; save the model again.")
    return clean


def _outer(names: Iterable[str]) -> str:
    """The component that stands before every name and begins no name of a layout; "" where there is none."""
    names = list(names)
    first = names[0].split(".")[0] + "."
    if not all(name.startswith(first) for name in names) or any(name == first for name in names):
        return ""
    if first == "model.":
        return first if any(name.startswith(OUTER) for name in names) else ""
    return "" if first.removesuffix(".") in ROOTS or first.removesuffix(".").isdigit() else first


def check_plain(names: Iterable[str], config: dict[str, object]) -> None:
    """Raise CheckpointError for tensors of an unmerged adapter, or of a model quantised for other programs."""
    names = list(names)
    parts = {part for name in names for part in name.split(".")}
    if parts & ADAPTERS:
        adapter = sorted(name for name in names if ADAPTERS & set(name.split(".")))
        raise CheckpointError(
            f"{counted(len(adapter), 'tensor')} of an adapter that was not merged (PEFT), {listed(adapter)}, which is "
            "not applied here; merge it (merge_and_unload), save the result, and use that."
        )
    table = config.get("quantization_config")
    method = table.get("quant_method") if isinstance(table, dict) else None
    if (
        isinstance(table, dict)
        and method is None
        and any(table.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
    ):
        method = "bitsandbytes"  # of its older versions
    found = (
        shown(method) if method is not None else next((FOREIGN[part] for part in sorted(parts & FOREIGN.keys())), None)
    )
    if found is not None:
        raise CheckpointError(
            f"The weights are quantised by {found}, which MLX cannot read; save the model in bfloat16 (for "
            "bitsandbytes: model.dequantize(), then save_pretrained), and quantise it here (`bits`)."
        )
