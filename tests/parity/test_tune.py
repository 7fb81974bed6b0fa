"""A step of fine-tuning against transformers and PEFT on the same rows, and adapters of PEFT's and mlx-lm's read and
written.

The model is transformers' own with random weights; ours is loaded from the checkpoint written of it. Updates are
PEFT's, random, and reach ours through the reader that people use.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image

from fastvlm_mlx import VLM, CheckpointError, TuneOptions, load
from fastvlm_mlx.convert.adapters import open_foreign_adapter
from fastvlm_mlx.convert.fold import by_filter
from fastvlm_mlx.convert.packed import STACKED
from fastvlm_mlx.convert.peft import to_peft
from fastvlm_mlx.decoding.adapting import adapted
from fastvlm_mlx.finetune.formats import read_rows
from fastvlm_mlx.finetune.learner import Learner
from fastvlm_mlx.finetune.material import divided, prepare
from fastvlm_mlx.finetune.samples import IMAGE, Sample

from . import original
from .stages import to_torch

peft = pytest.importorskip("peft", reason="PEFT is part of the extra test")
pytestmark = pytest.mark.slow

LOSS, GRADIENT = 2e-6, 1e-4  # what is promised; sums of float32 in another order differ by less
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = TuneOptions(replay="none", cache="none", lr=1e-3, projector_lr=1e-3, clip=1e6, weight_decay=0.1, warmup=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> tuple[Any, VLM]:
    """transformers' model, and ours of the same weights."""
    theirs = original.build(original.SMALL)
    folder = original.save_apple(theirs, tmp_path_factory.mktemp("tune") / "apple", tokenizer_files)
    return theirs, load(folder, dtype="float32")


def with_updates(seed: int, **how: Any) -> Any:
    """transformers' model once more, with PEFT's updates of random values."""
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": PROJECTIONS,
        "modules_to_save": ["multi_modal_projector"],
    } | how
    model = peft.get_peft_model(original.build(original.SMALL), peft.LoraConfig(**settings))
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            drawn = torch.randn(parameter.shape, generator=noise)
            wide = parameter.abs().max().item() or 1.0
            parameter.data.add_(
                0.1 * wide * drawn
            ) if "magnitude" in name or "modules" in name else parameter.data.copy_(0.2 * drawn)
    return model


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rows")
    colours = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    found = []
    for number, picture in enumerate(colours):
        Image.fromarray(picture).resize((128, 128)).save(folder / f"{number}.png")
        answer = "A red circle on the table." * (number + 1)
        found.append({"image": str(folder / f"{number}.png"), "question": "What is it?", "answer": answer})
    return found


def their_loss(model: Any, vlm: VLM, samples: list[Sample]) -> torch.Tensor:
    """The loss per token over all rows, of each row computed alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    losses = []
    for sample in samples:
        pixels = vlm.engine.pixels(sample.row.images[0])[None]
        ids = torch.tensor(sample.ids.astype(np.int64))
        embedded = inner.model.language_model.embed_tokens(ids.clamp(min=0))
        picture = inner.model.get_image_features(to_torch(pixels)).pooler_output[0]
        places = torch.tensor(sample.ids == IMAGE)
        embedded = embedded.masked_scatter(places[:, None], picture)
        hidden = inner.model.language_model(inputs_embeds=embedded[None]).last_hidden_state[0]
        logits = inner.lm_head(hidden[torch.tensor(sample.places.astype(np.int64)) - 1])
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(sample.targets.astype(np.int64)), reduction="sum")
        )
    return torch.stack(losses).sum() / sum(len(sample.places) for sample in samples)


def learner_of(vlm: VLM, rows: list[dict[str, Any]], folder: Path, options: TuneOptions) -> tuple[Learner, Any]:
    """A learner whose updates and projector are those of an adapter, and its material."""
    adapter = open_foreign_adapter(folder, vlm.config)
    network, _ = adapted(vlm.model, vlm.config, adapter)
    network.freeze()
    for _, module in network.named_modules():
        module.unfreeze(recurse=False, keys=[key for key in ("lora_a", "lora_b", "magnitude") if key in module])
    network.projector.unfreeze()
    options = options.resolved()
    data = divided(read_rows(rows), [], [], 0)
    return Learner(network, options, 100), prepare(vlm.engine, data, options, lambda *told: None)


def their_gradients(model: Any, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT's gradients in the shape of ours: of stacked projections, the blocks that exist there."""
    named = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    found = {}
    for name in ours:
        path, _, part = name.rpartition(".")
        if path.startswith("projector."):
            theirs = named[
                f"base_model.model.model.multi_modal_projector.modules_to_save.default.{path.partition('.')[2]}.{part}"
            ]
            found[name] = np.array(by_filter(mx.array(theirs), 1)) if name == "projector.linear_1.weight" else theirs
            continue
        whole = next((w for w in STACKED if path.endswith(w)), None)
        parts = STACKED[whole] if whole else [path.rpartition(".layers.")[2].partition(".")[2]]
        home = path.removesuffix(whole) if whole else path.removesuffix(parts[0])
        start = "base_model.model.model.language_model." + home.removeprefix("text.")
        kind = {
            "lora_a": "lora_A.default.weight",
            "lora_b": "lora_B.default.weight",
            "magnitude": "lora_magnitude_vector.default.weight",
        }
        pieces = [named[f"{start}{each}.{kind[part]}"] for each in parts]
        if part != "lora_b" or len(pieces) == 1:
            found[name] = np.concatenate(pieces)
            continue
        block = np.zeros_like(ours[name])
        row = column = 0
        for piece in pieces:
            block[row : row + len(piece), column : column + piece.shape[1]] = piece
            row, column = row + len(piece), column + piece.shape[1]
        ours[name] = np.where(block == 0, 0, ours[name])  # outside the blocks are values that PEFT has not
        found[name] = block
    return found


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_loss_gradient_and_a_step(
    base: tuple[Any, VLM], rows: list[dict[str, Any]], tmp_path: Path, how: dict[str, Any]
) -> None:
    vlm = base[1]
    model = with_updates(1, **how)
    model.save_pretrained(tmp_path / "peft")
    learner, material = learner_of(vlm, rows, tmp_path / "peft", OPTIONS)
    samples = [sample for each in material.new for sample in each]
    model.zero_grad()
    expected = their_loss(model, vlm, samples)
    expected.backward()
    loss, tokens, gradient = learner.gradient(material.parts(material.new))
    assert abs(loss / tokens - expected.item()) < LOSS * expected.item()
    pairs: Any = tree_flatten(gradient)
    ours = {name: np.array(array) for name, array in pairs}
    theirs = their_gradients(model, ours)
    assert len(ours) == 4 + 3 * 4 * (3 if "use_dora" in how else 2)
    far = {n: d for n in ours if (d := float(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max())) > GRADIENT}
    assert far == {}

    bias, weight = "projector.linear_2.bias", "projector.linear_2.weight"
    module = model.get_base_model().model.multi_modal_projector.modules_to_save["default"].linear_2
    optimizer = torch.optim.AdamW(
        [{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias], "weight_decay": 0.0}], lr=1e-3
    )
    optimizer.step()
    learner.step(material.parts(material.new))
    after = learner.moment().parameters
    for name, moved in ((bias, module.bias), (weight, module.weight)):
        sure = np.abs(theirs[name]) > GRADIENT * np.abs(theirs[name]).max()  # Adam's first step is the gradient's sign
        assert sure.mean() > 0.99
        np.testing.assert_allclose(np.array(after[name])[sure], moved.detach().numpy()[sure], rtol=1e-5, atol=2e-6)


def logits(model: Any, vlm: VLM, rows: list[dict[str, Any]]) -> np.ndarray:
    """transformers' loss of each row: what an adapter makes of the model, in a few numbers."""
    data = divided(read_rows(rows), [], [], 0)
    material = prepare(vlm.engine, data, OPTIONS.resolved(), lambda *told: None)
    with torch.no_grad():
        return np.array([their_loss(model, vlm, [sample]).item() for each in material.new for sample in each])


@pytest.mark.parametrize(
    "how",
    [
        {}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 5, "k_proj": 9}, "modules_to_save": None},
    ],
    ids=["lora", "dora", "two projections", "patterns"],
)  # fmt: skip
def test_peft_there_and_back(
    base: tuple[Any, VLM], rows: list[dict[str, Any]], tmp_path: Path, how: dict[str, Any]
) -> None:
    theirs, vlm = base
    model = with_updates(2, **how)
    model.save_pretrained(tmp_path / "peft")
    adapter = open_foreign_adapter(tmp_path / "peft", vlm.config)
    to_peft(adapter, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(original.build(original.SMALL), tmp_path / "back")
    one, two, bare = (logits(each, vlm, rows) for each in (model, again, theirs))
    assert np.abs(one - bare).max() > 1e-2  # it says something else than the model alone
    np.testing.assert_allclose(two, one, rtol=1e-5)
    thrice = open_foreign_adapter(tmp_path / "back", vlm.config)
    for name, array in adapter.tensors.items():
        if name.endswith(("qkv_proj.lora_a", "gate_up_proj.lora_a")):
            assert np.array_equal(np.array(thrice.tensors[name]), np.array(array))  # A is shared, B comes back whole
        np.testing.assert_allclose(
            np.array(thrice.tensors[name]), np.array(array), atol=1e-5 * float(mx.abs(array).max())
        )


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_of_mlx_lm(base: tuple[Any, VLM], rows: list[dict[str, Any]], tmp_path: Path, kind: str) -> None:
    """Written by mlx-lm's own layers on its own Qwen2, and answered with by ours as by mlx-lm."""
    import json

    from mlx_lm.models.qwen2 import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs, vlm = base
    text = theirs.config.text_config
    arguments = ModelArgs(
        model_type="qwen2", hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers,
        intermediate_size=text.intermediate_size, num_attention_heads=text.num_attention_heads, rms_norm_eps=1e-6,
        vocab_size=text.vocab_size, num_key_value_heads=text.num_key_value_heads, rope_theta=1e6,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Model(arguments)
    state = {n: mx.array(p.detach().numpy()) for n, p in theirs.model.language_model.named_parameters()}
    model.load_weights([(f"model.{name}", array) for name, array in state.items()])
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    model.freeze()
    if kind == "full":
        for layer in model.model.layers[-1:]:
            layer.unfreeze()
    else:
        keys = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]
        linear_to_lora_layers(model, 2, {**settings, "keys": keys}, use_dora=kind == "dora")
    trained = dict(tree_flatten(model.trainable_parameters()))
    for number, (name, array) in enumerate(sorted(trained.items())):
        noise = mx.random.normal(array.shape, key=mx.random.key(number))
        trained[name] = array + (0.02 if kind == "full" or name.endswith(".m") else 0.2) * noise
    model.load_weights(list(trained.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trained)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings, "model": "some/Qwen2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ids = list(range(5, 45))
    bare = np.array(vlm.model.text.logits(vlm.model.text(vlm.model.embed([ids], {}))))
    vlm.use(tmp_path)
    try:
        ours = np.array(vlm.model.text.logits(vlm.model.text(vlm.model.embed([ids], {}))))
    finally:
        vlm.use(None)
    expected = np.array(model(mx.array([ids])))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max() < 1e-2 * np.abs(bare - expected).max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias"), ({"r": "four"}, "'four'"),
        ({"peft_type": None}, "neither model_type"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_over_is_named(
    base: tuple[Any, VLM], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    import json

    with_updates(3).save_pretrained(tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError) as error:
        base[1].use(tmp_path)
    assert words in str(error.value)


def test_layers_without_a_place_are_named(base: tuple[Any, VLM], tmp_path: Path) -> None:
    with_updates(3, target_modules=[*PROJECTIONS, "fc1"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"timm_model.*fc1.*merge the adapter"):
        base[1].use(tmp_path)
