"""Quantising: every mode against plain arithmetic, the plan and its reasons, folders, folded scales, and a budget
spent."""

import gc
import itertools
import json
import shutil
import weakref
from copy import copy
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import VLM, load
from fastvlm_mlx.backend import cpu
from fastvlm_mlx.backend.cpu import packed as packed_matrices
from fastvlm_mlx.calibrate import awq, chain, examples, pipeline, quality, report, search, sensitivity
from fastvlm_mlx.config import QuantConfig
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.errors import CheckpointError, ImageError, OptionError, OutputError, PromptError
from fastvlm_mlx.hub.find import find
from fastvlm_mlx.hub.names import Found
from fastvlm_mlx.network.memory import weight_bytes
from fastvlm_mlx.quantize import layers, recipes, rounding

from .. import checkpoint

AFFINE = [QuantConfig(bits, group) for bits in recipes.BITS for group in (32, 64, 128)]
SETTINGS = [*AFFINE, *(mode for name, mode in recipes.MODES.items() if name != "affine")]


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def name_of(settings: QuantConfig) -> str:
    return f"{settings.mode}-{settings.bits}-{settings.group_size}"


@pytest.fixture
def questions() -> list[examples.Question]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 80, 3), dtype=np.uint8) for _ in range(2)]
    return [
        examples.Question(pictures[0], "What?"),
        examples.Question(pictures[1], "Where?", "here"),
        examples.Question(pictures[0], "Who is it?"),
    ]


@pytest.fixture
def mixed() -> recipes.Recipe:
    return recipes.choose("mixed")


@pytest.mark.parametrize("settings", AFFINE, ids=name_of)
@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float16])
def test_affine_rounding(settings: QuantConfig, stored: mx.Dtype) -> None:
    """MLX reads what was packed, every weight is at its group's nearest level, and the levels are about as good as
    MLX's."""
    weight = random(6, 256)
    packed, scales, offsets = (tensor for _, tensor in rounding.quantized("weight", weight, settings, stored))
    assert packed.dtype == mx.uint32 and scales.dtype == offsets.dtype == stored
    q = packed_matrices.unpack(packed, settings.bits)
    assert np.array(q).max() <= 2**settings.bits - 1
    groups = np.array(q).reshape(6, -1, settings.group_size)
    wide = groups * np.array(scales.astype(mx.float32))[..., None] + np.array(offsets.astype(mx.float32))[..., None]
    read = rounding.dequantized([packed, scales, offsets], settings)
    assert np.allclose(np.array(read).ravel(), wide.ravel(), atol=1e-6)
    levels = (
        np.arange(2**settings.bits) * np.array(scales.astype(mx.float32))[..., None]
        + np.array(offsets.astype(mx.float32))[..., None]
    )
    exact = np.array(weight).reshape(wide.shape)
    nearest = np.abs(levels[..., None, :] - exact[..., None]).min(axis=-1)
    assert (np.abs(wide - exact) <= nearest + 1e-6).all()
    mlx_error = mx.square(
        mx.dequantize(*mx.quantize(weight, settings.group_size, settings.bits), settings.group_size, settings.bits)
        - weight
    )
    assert mx.square(read - weight).mean().item() < 1.15 * mlx_error.mean().item() + 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_numbers_follow_each_other_bit_by_bit(bits: int) -> None:
    q = np.random.default_rng(bits).integers(0, 1 << bits, (6, 96), dtype=np.uint32)
    q[0], q[1] = 0, (1 << bits) - 1
    packed = np.array(rounding.pack(mx.array(q), bits))
    assert packed.dtype == np.uint32
    for row, words in zip(q.tolist(), packed, strict=True):
        whole = sum(number << (place * bits) for place, number in enumerate(row))
        assert words.tobytes() == whole.to_bytes(96 * bits // 8, "little")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_that_fit_a_word_are_packed_by_one_sum(bits: int) -> None:
    """On a GPU every primitive that is no view is a kernel, and a decoder is packed in hundreds of pieces while it
    loads."""
    found: list[str] = []
    mx.export_function(
        lambda entry: found.append(entry.get("name", "")),
        lambda q: rounding.pack(q, bits),
        mx.zeros((8, 64), mx.uint32),
    )
    assert found.count("BitwiseBinary") == found.count("Reduce") == 1
    assert not {"Slice", "Gather", "Concatenate"} & set(found)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_quantised_product_is_that_of_the_weights_it_stands_for(
    settings: QuantConfig, keeps: bool, rows: int
) -> None:
    """Float32 sums of 128 products in another order: 1e-5 of the largest."""
    weight, bias, x = random(48, 128), random(48, seed=1), random(2, rows, 128, seed=2)[:1]
    parts = rounding.quantized("weight", weight, settings, mx.bfloat16)
    wide = np.array(rounding.dequantized([tensor for _, tensor in parts], settings)).astype(np.float64)
    tensors = [
        (name, tensor if tensor.dtype in (mx.uint32, mx.uint8) else tensor.astype(mx.float32)) for name, tensor in parts
    ]
    linear = layers.QuantizedLinear(48, 128, settings, bias=True)
    linear.load_weights([*tensors, ("bias", bias)])
    embedding = layers.QuantizedEmbedding(48, 128, settings)
    embedding.load_weights(tensors)
    linear.keeps_dequantised = embedding.keeps_dequantised = keeps
    expected = np.array(x).astype(np.float64) @ wide.T
    tolerance = 1e-5 * np.abs(expected).max()
    for _ in range(2):  # with what was kept the first time
        assert np.abs(np.array(linear(x)) - expected - np.array(bias)).max() < tolerance
        assert np.abs(np.array(embedding.as_linear(x)) - expected).max() < tolerance
    assert np.array_equal(
        np.array(embedding(mx.array([7, 0, 47])).astype(mx.float32)), wide[[7, 0, 47]].astype(np.float32)
    )


def test_what_is_kept_wide_fits_its_share_of_the_memory() -> None:
    matrices = [layers.QuantizedEmbedding(64, 64, QuantConfig(4, 64)) for _ in range(3)]
    cpu.keep_dequantised(matrices, packed_matrices.DEQUANTISED_SHARE * 64 * 64 * 4 * 2)
    assert [matrix.keeps_dequantised for matrix in matrices] == [True, True, False]


def test_the_plan_and_its_reasons(small: VLM) -> None:
    chosen, left = recipes.plan(small.model, recipes.choose("4bit"))
    assert chosen["text.layers.0.mlp.down_proj"] == QuantConfig(4, 64)
    assert chosen["text.embed_tokens"] == chosen["projector.linear_1"] == QuantConfig(8, 64)
    assert (
        "kept exact" in left["vision.stages.0.blocks.0.convffn.fc1"]
        and "convolution" in left["vision.patch_embed.conv"]
    )
    every = {path for path, layer in small.model.named_modules() if "weight" in layer and layer.weight.ndim > 1}
    assert chosen.keys() | left.keys() == every and not chosen.keys() & left.keys()
    chosen, left = recipes.plan(small.model, recipes.choose("small"))
    assert chosen["vision.stages.1.blocks.0.convffn.fc1"] == QuantConfig(8, 32)  # the next smaller group
    assert "width 16" in left["vision.stages.0.blocks.0.convffn.fc1"]


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_the_plan_of_a_mode(small: VLM, mode: str) -> None:
    chosen, _ = recipes.plan(small.model, recipes.choose(mode=mode))
    assert chosen["text.layers.1.self_attn.qkv_proj"] == recipes.MODES[mode]
    assert chosen["text.embed_tokens"] == QuantConfig(8, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "5bit"}, "`recipe` is '5bit'"), ({"bits": 7}, "`bits` is 7"), ({"bits": True}, "`bits` is True"),
        ({"name": "4bit", "bits": 4}, "choose one"), ({"mode": "fp4"}, "`mode` is 'fp4'"),
        ({"group_size": 48}, "`group_size` is 48"),
        ({"mode": "mxfp4", "bits": 8}, "mxfp4 has 4 bits in groups of 32"),
        ({"name": "small", "mode": "mxfp4"}, "together"),
        ({"target_bits": 4.5}, "only the recipe 'mixed'"), ({"name": "mixed", "target_bits": 1}, "2.25 to 8.5"),
        ({"name": "mixed", "target_bits": float("nan")}, "2.25 to 8.5"),
    ],
)  # fmt: skip
def test_options_that_make_no_recipe(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipes.choose(**options)  # type: ignore[arg-type]


def test_a_group_size_no_layer_can_take(tmp_path: Path, tokenizer_files: Path) -> None:
    small = checkpoint.write(tmp_path / "small", tokenizer_files, intermediate_size=64)
    weights = load(str(small)).model.text
    with pytest.raises(OptionError, match=r"multiple of the group size 128 \(widths '64'\)"):
        recipes.plan(weights, recipes.choose(bits=4, group_size=128))


def tensors(vlm: VLM | Engine) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in vlm.model.flat_parameters().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        *map(recipes.choose, ("4bit", "8bit", "small", "plain")),
        *(recipes.choose(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")),
    ],
    ids=lambda recipe: recipe.name,
)
def test_a_folder_holds_what_loading_gives(apple: Path, tmp_path: Path, recipe: recipes.Recipe) -> None:
    opened = open_model(Found(apple, "small", "folder"))
    written = pipeline.quantize(opened, apple, tmp_path / "out", recipe)
    saved = load(str(tmp_path / "out"), dtype="float32")
    assert saved.config.quantization == written.config.quantization
    memory = pipeline.trial(opened, recipe, [])
    ours, theirs = tensors(saved), tensors(memory)
    assert ours.keys() == theirs.keys()
    parts = [f"{path}.{part}" for path in written.config.quantization for part in ("weight", "scales", "biases")]
    assert all(np.array_equal(ours[name], theirs[name]) for name in parts if name in ours)
    image = np.zeros((50, 50, 3), np.uint8)
    again = load(str(tmp_path / "out"), dtype="float32")
    assert saved.generate(image, "Hi", max_tokens=8).token_ids == again.generate(image, "Hi", max_tokens=8).token_ids
    stored = checkpoint.load(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in stored.values()} <= {mx.bfloat16, mx.uint32, mx.uint8}
    assert sum(array.nbytes for array in stored.values()) == sum(weight_bytes(written.config).values())
    assert "bits" in (tmp_path / "out" / "README.md").read_text()


def test_loading_is_strict(apple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.quantize(open_model(Found(apple, "small", "folder")), apple, out, recipes.choose("4bit"))
    config, weights = json.loads((out / "config.json").read_text()), checkpoint.read(out)
    name = "text.layers.0.mlp.down_proj"

    def refused(change: dict[str, object], message: str) -> None:
        quantization = {**config["quantization"], **change}
        (out / "config.json").write_text(
            json.dumps({**config, "quantization": {k: q for k, q in quantization.items() if q}})
        )
        with pytest.raises(CheckpointError, match=message):
            load(str(out))

    refused({name: None}, r"down_proj|shape")
    refused({name: {"bits": 8, "group_size": 64, "mode": "affine"}}, "shape")
    refused({name: {"bits": 7, "group_size": 64, "mode": "affine"}}, "cannot quantise")
    refused({name: {"bits": 4, "group_size": 48, "mode": "affine"}}, "cannot quantise")
    refused({name: {"bits": 4, "group_size": 64, "mode": "mxfp4"}}, "cannot quantise")
    refused({"text.layers.0.input_layernorm": {"bits": 4, "group_size": 64, "mode": "affine"}}, "no matrix")
    refused({"nowhere": {"bits": 4, "group_size": 64, "mode": "affine"}}, "no matrix")
    (out / "config.json").write_text(json.dumps(config))
    del weights[f"{name}.scales"]
    checkpoint.save(out / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"down_proj\.scales.*missing"):
        load(str(out))


def test_what_is_quantised_is_not_quantised_again(apple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.quantize(open_model(Found(apple, "small", "folder")), apple, out, recipes.choose("4bit"))
    with pytest.raises(CheckpointError, match="quantised already"):
        pipeline.quantize(open_model(Found(out, "small", "folder")), out, tmp_path / "again", recipes.choose("8bit"))
    with pytest.raises(OptionError, match="quantised already"):
        load(str(out), bits=8)


def test_nothing_is_left_where_there_is_no_room(apple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="GB free"):
        pipeline.quantize(open_model(Found(apple, "small", "folder")), apple, tmp_path / "out", recipes.choose("4bit"))
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def test_calibration_needs_pictures(apple: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`pictures`"):
        pipeline.quantize(open_model(Found(apple, "small", "folder")), apple, tmp_path / "out", recipes.choose("mixed"))
    with pytest.raises(OptionError, match="`pictures`"):
        examples.questions_for(open_model(Found(apple, "tiny", "folder")), None)  # whatever it is called
    assert len(examples.questions_for(open_model(find("tiny")), None)) > 100


@pytest.mark.parametrize("scale", ["narrow", "stored"])
def test_folded_scales_change_nothing(apple: Path, scale: str) -> None:
    """In both kinds of block, with two query heads to a value head; float32 throughout, or a norm rounded to 16
    bits."""
    vlm = load(str(apple), dtype="float32")
    model, image = vlm.model, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ids = [list(range(40, 60))]

    def results() -> tuple[np.ndarray, np.ndarray]:
        return np.array(vlm.encode_image(image)), np.array(model.prefill(model.embed(ids, {}), model.text.make_cache()))

    before = results()
    paths = ["text.layers.0", "text.layers.1", "vision.stages.0.blocks.0", "vision.stages.3.blocks.0"]
    folds = [fold for path in paths for fold in awq.folds(path, layers.layer_at(model, path))]
    assert len(folds) == 2 * 4 + 1 + 3
    kind = mx.float32 if scale == "narrow" else mx.bfloat16
    for number, fold in enumerate(folds):
        width = layers.layer_at(model, fold.layer).weight.shape[1]
        scales = mx.exp(random(width // fold.repeat, seed=number) / 2)
        weight = layers.layer_at(model, fold.layer).weight
        awq.apply_fold(model, fold, scales, kind)
        assert not np.array_equal(np.array(weight), np.array(layers.layer_at(model, fold.layer).weight))
    for old, new in zip(before, results(), strict=True):
        assert np.abs(old - new).max() < 2e-5 * np.abs(old).max()


def test_searched_scales_are_never_worse_than_none() -> None:
    rng = np.random.default_rng(0)
    inputs = mx.array((rng.standard_normal((200, 64)) * np.exp(2 * rng.standard_normal(64))).astype(np.float32))
    weight, settings = random(48, 64), QuantConfig(3, 32)
    fold = awq.Fold("layer", "source", 0, 32, repeat=2, head=16)
    scales = awq.search(weight, inputs, fold, settings, mx.bfloat16)
    columns = awq.spread(scales, fold)
    assert scales.shape == (32,) and np.array_equal(np.array(columns)[:16], np.array(columns)[16:32])

    def error(factors: mx.array) -> float:
        off = rounding.rounded(weight * factors, settings, mx.bfloat16) / factors - weight
        return float(mx.square(inputs @ off.T).mean().item())  # type: ignore[arg-type]

    assert error(columns) < 0.9 * error(mx.ones((64,)))


def test_a_budget_goes_where_it_saves_most() -> None:
    """Against every combination: within the budget, and no worse than the best that spends one hull step less."""
    rng = np.random.default_rng(0)
    every = {
        f"{n}": sensitivity.hull(
            [
                sensitivity.Choice(
                    QuantConfig(bits, 64), 10.0 * (n + 1) * (bits + 0.5), float(rng.random() * 4.0 ** (4 - bits))
                )
                for bits in recipes.BITS
            ]
        )
        for n in range(4)
    }
    for choices in every.values():
        gains = [(a.kl - b.kl) / (b.bytes - a.bytes) for a, b in itertools.pairwise(choices)]
        assert gains == sorted(gains, reverse=True) and all(gain > 0 for gain in gains)

    def totals(plan: recipes.Plan) -> tuple[float, float]:
        picked = [next(c for c in every[path] if c.settings == settings) for path, settings in plan.items()]
        return sum(c.bytes for c in picked), sum(c.kl for c in picked)

    everything = [
        (sum(c.bytes for c in picked), sum(c.kl for c in picked)) for picked in itertools.product(*every.values())
    ]
    for budget in (550.0, 700.0, 850.0):
        spent, kl = totals(sensitivity.spend(every, budget))
        largest = max(b.bytes - a.bytes for choices in every.values() for a, b in itertools.pairwise(choices))
        assert spent <= budget
        assert kl <= min(kl for nbytes, kl in everything if nbytes <= budget - largest)


@pytest.mark.slow
def test_the_chain_is_the_network(
    small: VLM, questions: list[examples.Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches filled up on the right give the logits that each question gives alone, also when a batch holds a single
    one."""
    found = examples.answered(small.engine, questions)
    assert len(found.pixels) == 2 and [item.picture for item in found.items] == [0, 1, 0]
    for positions in (4096, 1):
        monkeypatch.setattr(chain, "MAX_BATCH_POSITIONS", positions)
        together = np.concatenate([np.array(logits) for logits in chain.Chain(small.model, found).scores().rows()])
        alone = []
        for item in found.items:
            cache = small.model.text.make_cache()
            image = small.model.encode(mx.array(found.pixels[item.picture][None]))[0]
            logits = [small.model.prefill(small.model.embed(item.pieces, {0: image}), cache)]
            logits += [small.model.step(mx.array([token]), cache) for token in item.ids[:-1]]
            alone += [np.array(each[0]) for each in logits]
        assert together.shape == np.shape(alone)
        assert np.abs(together - np.array(alone)).max() < 1e-4 * np.abs(together).max()


@pytest.mark.slow
def test_a_model_beside_itself_and_beside_fewer_bits(
    apple: Path, small: VLM, questions: list[examples.Question]
) -> None:
    reference = quality.reference(small.engine, questions, "exact")
    assert reference.own.accuracy == 0 and reference.own.bits_per_weight is None
    same = quality.compare(small.engine, reference, questions, "same")
    assert same.kl < 1e-9 and same.top1 == same.top5 == same.same_answers == 1
    rough = quality.compare(load(str(apple), bits=2, dtype="float32").engine, reference, questions, "2bit")
    fine = quality.compare(load(str(apple), bits=8, dtype="float32").engine, reference, questions, "8bit")
    assert rough.kl > 20 * fine.kl > 0 and rough.top1 < 1 and rough.bytes < fine.bytes < reference.own.bytes
    assert fine.bits_per_weight == pytest.approx(8.5) and 2.5 < (rough.bits_per_weight or 0) < 8.5
    every = [reference.own, rough, fine]
    assert [line.split()[0] for line in report.table(every).splitlines()] == ["weights", "exact", "2bit", "8bit"]
    assert [each["name"] for each in json.loads(report.to_json(every))["qualities"]] == ["exact", "2bit", "8bit"]
    assert report.markdown(every).count("\n| ") == 4
    drawn = report.picture(every, "a < b")
    assert drawn.count("<circle") == 2 and "a &lt; b" in drawn


def test_divergence_is_the_definition() -> None:
    theirs, ours = random(7, 11), random(7, 11, seed=1)
    p, q = (np.exp(np.array(x).astype(np.float64)) for x in (theirs, ours))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    scores = (chain.Scores([logits[:3], logits[3:]], lambda hidden: hidden) for logits in (theirs, ours))
    assert quality.divergence(*scores) == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)


def test_scores_keep_the_head_they_were_made_with(small: VLM, questions: list[examples.Question]) -> None:
    found = examples.answered(small.engine, questions)
    scores = chain.Chain(small.model, found).scores()
    before = [np.array(rows) for rows in scores.rows()]
    path = "text.lm_head" if "lm_head" in small.model.text else "text.embed_tokens"
    whole = layers.layer_at(small.model, path)
    other = copy(whole)
    other.weight = mx.zeros(whole.weight.shape)
    layers.put_layer(small.model, path, other)
    try:
        assert all((np.array(rows) == kept).all() for rows, kept in zip(scores.rows(), before, strict=True))
    finally:
        layers.put_layer(small.model, path, whole)


@pytest.mark.slow
def test_more_pictures_take_little_more_memory(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrating the decoder keeps a picture's embeddings and not its maps, the hidden states of answers and not their
    logits."""
    monkeypatch.setattr(chain, "MAX_BATCH_POSITIONS", 128)  # a batch is full with four pictures
    peaks = []
    for count in (4, 24):
        vlm = load(str(apple), dtype="float32")
        rng = np.random.default_rng(0)
        asked = examples.Question(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "What?")
        found = examples.answered(vlm.engine, [asked])
        many = examples.Examples(
            found.pixels * count, [replace(found.items[0], picture=number) for number in range(count)]
        )
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        search.calibrate(vlm.engine, many, recipes.choose("mixed"), search.SearchState(None, ""))
        peaks.append(mx.get_peak_memory() - before)
    logits = 4 * vlm.config.text.vocab_size * len(found.items[0].ids)
    more = (peaks[1] - peaks[0]) / 20
    assert found.pixels[0].nbytes < more < found.pixels[0].nbytes + logits, peaks


def test_steps_nobody_looks_into_are_one(small: VLM, questions: list[examples.Question]) -> None:
    found = examples.answered(small.engine, questions)
    alone = chain.Chain(small.model, found).steps
    assert [step.each for step in alone] == [True, False, True, False]
    assert (alone[0].paths[0], alone[0].paths[-1]) == ("vision.patch_embed", "projector")
    layers = ["vision.stages.1.blocks.0.convffn.fc1", "text.layers.1.mlp.down_proj"]
    steps = chain.Chain(small.model, found, layers).steps
    assert [step.paths for step in steps if step.among(layers)] == [("vision.stages.1.blocks.0",), ("text.layers.1",)]
    assert [path for step in steps for path in step.paths] == [path for step in alone for path in step.paths]


@pytest.mark.slow
def test_scores_keep_no_decoder(apple: Path, questions: list[examples.Question]) -> None:
    vlm = load(str(apple), dtype="float32")
    scores = chain.Chain(vlm.model, examples.answered(vlm.engine, questions)).scores()
    kept = weakref.ref(vlm.model.text.layers[0])
    del vlm
    gc.collect()
    assert kept() is None and sum(map(len, scores.rows())) > 0


@pytest.mark.slow
def test_the_tower_is_calibrated_too(apple: Path, tmp_path: Path, questions: list[examples.Question]) -> None:
    recipe = recipes.choose("mixed", tower=True)
    result = pipeline.quantize(
        open_model(Found(apple, "small", "folder")), apple, tmp_path / "out", recipe, questions=questions[:1]
    )
    assert any(path.startswith("vision.") for path in result.config.quantization)


@pytest.mark.slow
def test_mixed_keeps_to_its_budget_and_goes_on_where_it_was(
    apple: Path,
    tmp_path: Path,
    mixed: recipes.Recipe,
    questions: list[examples.Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, whole, broken = open_model(Found(apple, "small", "folder")), tmp_path / "whole", tmp_path / "broken"
    result = pipeline.quantize(opened, apple, whole, mixed, questions=questions, measure=True)
    assert [each.name for each in result.qualities] == ["unquantised", "mixed"]
    assert 4.0 < (result.qualities[1].bits_per_weight or 0) <= 4.5
    assert "(AWQ)" in (whole / "README.md").read_text()
    assert "## Quality" in (whole / "README.md").read_text() and json.loads((whole / "quality.json").read_text())

    def interrupt(label: str, share: float) -> None:
        if label == "Calibrating" and share > (1 + 0.8) / 3:  # the second of three phases
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(opened, apple, broken, mixed, questions=questions, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "broken.calibration", "whole"]
    probed: list[float] = []
    monkeypatch.setattr(search, "divergence", lambda *args: probed.append(quality.divergence(*args)) or probed[-1])
    pipeline.quantize(opened, apple, broken, mixed, questions=questions)
    assert 0 < len(probed) < len(result.config.quantization)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "broken", "whole"]
    one, two = checkpoint.read(whole), checkpoint.read(broken)
    assert one.keys() == two.keys() and all(mx.array_equal(one[name], two[name]).item() for name in one)


def test_a_state_of_another_run_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = search.SearchState(path, "one")
    state.scales["layer"], state.kl["layer"] = mx.ones((3,)), 0.5
    state.save()
    assert search.SearchState.open(path, "one").kl == {"layer": 0.5}
    assert not search.SearchState.open(path, "two").kl
    path.write_bytes(b"not a state")
    assert not search.SearchState.open(path, "one").scales


def test_a_budget_too_small_is_said_before_any_work(apple: Path, small: VLM) -> None:
    recipe = replace(recipes.choose("mixed"), target_bits=2.1)
    chosen, _ = recipes.plan(small.model, recipe)
    with pytest.raises(OptionError, match=r"the least these layers take is 2\.\d+"):
        search.budget_bytes(small.model, chosen, recipe)


def test_folders_of_questions(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such folder"):
        examples.read_questions(tmp_path / "none")
    with pytest.raises(ImageError, match="no pictures"):
        examples.read_questions(tmp_path)
    (tmp_path / "b.png").touch()
    (tmp_path / "a.JPG").touch()
    (tmp_path / "notes.txt").touch()
    assert [(Path(str(q.image)).name, q.text, q.answer) for q in examples.read_questions(tmp_path)] == [
        ("a.JPG", "Describe the image.", None), ("b.png", "Describe the image.", None),
    ]  # fmt: skip
    listing = tmp_path / "questions.jsonl"
    listing.write_text('{"image": "b.png", "question": "What?", "answer": "It."}\n\n{"image": "b.png"}\n')
    assert [(q.text, q.answer) for q in examples.read_questions(tmp_path)] == [
        ("What?", "It."),
        ("Describe the image.", None),
    ]
    for line in (
        "[]",
        "{",
        '{"image": "../b.png"}',
        '{"image": 3}',
        '{"image": "b.png", "question": 1}',
        '{"question": "What?"}',
    ):
        listing.write_text(f'{{"image": "b.png"}}\n{line}\n')
        with pytest.raises(PromptError, match="line 2"):
            examples.read_questions(tmp_path)
