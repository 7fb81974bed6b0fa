"""Fine-tuning a small random model: what is learned, that nothing decides but tokens, and that a run that ended goes on
as it was.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx import (
    VLM,
    CheckpointError,
    ImageError,
    OptionError,
    OutputError,
    PromptError,
    TrainingError,
    TuneOptions,
    tune,
)
from fastvlm_mlx.finetune import features
from fastvlm_mlx.finetune.batches import batches_of, order, sequences
from fastvlm_mlx.finetune.formats import read_rows
from fastvlm_mlx.finetune.learner import Learner
from fastvlm_mlx.finetune.material import Material, divided, prepare
from fastvlm_mlx.finetune.parts import network_to_train
from fastvlm_mlx.finetune.samples import IMAGE, as_shown, samples_of
from fastvlm_mlx.network.model import FastVLM
from tests import checkpoint

WORDS = ("A red circle.", "A blue square on the table.", "Left of the star.", "The image.", "What is it?")
QUICK = TuneOptions(steps=6, batch=3, rank=4, lr=3e-3, projector_lr=3e-3, eval_every=2, replay="none", cache="none")
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Six pictures, each with two questions whose answers have lengths of their own."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number in range(6):
        colour = tuple(255 * (number >> bit & 1) for bit in range(3))
        Image.new("RGB", (20 + 2 * number, 30), colour).save(folder / f"{number}.png")
        for question in (0, 1):
            answer = WORDS[(number + 2 * question) % len(WORDS)]
            found.append(
                {
                    "image": str(folder / f"{number}.png"),
                    "question": f"{'What? ' * (question + 1)}{number}",
                    "answer": answer,
                }
            )
    return found


def prepared(vlm: VLM, rows: Rows, options: TuneOptions) -> tuple[Material, FastVLM]:
    options = options.resolved()
    data = divided(read_rows(rows), [], [], 0)
    material = prepare(vlm.engine, data, options, lambda *told: None)
    return material, network_to_train(vlm.model, vlm.config, options)


def flat(tree: Any) -> dict[str, np.ndarray]:
    pairs: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]  # MLX says it may be a table
    return {name: np.array(array) for name, array in pairs}


def furthest(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """The largest difference between two gradients, of the largest value of each array."""
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name] - two[name]).max() / max(1e-12, np.abs(two[name]).max())) for name in one)


# What is learned of a row


def test_only_answers_and_the_ends_of_their_turns_are_learned(small: VLM) -> None:
    said = [
        {"role": "user", "content": "One <|im_end|>?"}, {"role": "assistant", "content": "First answer"},
        {"role": "user", "content": "<image>\nTwo?"}, {"role": "assistant", "content": "Second\n"},
    ]  # fmt: skip
    (sample,) = samples_of(small.engine, read_rows([{"image": "a.png", "messages": said}]), {})
    tokenizer, end = small.tokenizer, small.tokenizer.special("<|im_end|>")
    targets = sample.targets.tolist()
    assert targets == [*tokenizer.encode("First answer"), end, *tokenizer.encode("Second\n"), end]
    pieces = small.engine.pieces
    from fastvlm_mlx.inputs.prompt import Turn

    whole = pieces([Turn("One <|im_end|>?", 0, tuple(tokenizer.encode("First answer"))), Turn("Two?", 1)])
    flattened = [token for piece in whole for token in (piece if isinstance(piece, list) else [IMAGE] * len(piece))]
    assert sample.ids[: len(flattened)].tolist() == flattened
    shown = as_shown(small.engine, sample)
    assert "⟦First answer<|im_end|>⟧" in shown and shown.endswith("⟦Second\n<|im_end|>⟧")
    assert f"[a picture: {small.engine.image_tokens} positions]" in shown


def test_rows_that_are_too_long_and_pictures_that_are_broken(small: VLM, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    long = {"question": "What? " * 2000, "answer": "x"}
    with pytest.raises(
        PromptError, match=r"row 2: it takes \d+ tokens, 0 of them for pictures, .* has room for 1024; shorten"
    ):
        tune(small, [rows[0], long], QUICK)
    broken = {"image": str(tmp_path / "broken.png"), "question": "x", "answer": "y"}
    with pytest.raises(ImageError, match=r"2 rows cannot be used\. row 1: .*broken\.png.* row 3: .*missing\.png"):
        tune(small, [broken, rows[0], broken | {"image": str(tmp_path / "missing.png")}], QUICK)


# The gradient


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"train": ("lora", "projector")}, id="lora"),
        pytest.param({"train": ("full", "projector", "tower")}, id="everything"),
        pytest.param({"train": ("lora",), "dora": True, "rslora": True}, id="dora"),
    ],
)
def test_batches_sharing_and_checkpoints_come_to_one_gradient(small: VLM, rows: Rows, change: dict[str, Any]) -> None:
    options = replace(QUICK, **change)
    material, network = prepared(small, rows, options)
    learner = Learner(network, options.resolved(), 10)
    if "lora" in change["train"]:  # B is zero at first, and A would have no gradient
        network.update(
            _mapped(
                network.trainable_parameters(),
                lambda name, x: x + 0.05 * mx.random.normal(x.shape, key=mx.random.key(1)),
            )
        )
    drawn = material.new[:6]
    loss, tokens, whole = learner.gradient(material.parts(drawn))
    assert all(np.abs(gradient).max() > 0 for gradient in flat(whole).values())
    pieces = [part for some in (drawn[:1], drawn[1:3], drawn[3:]) for part in material.parts(some)]
    shared = sequences([sample for each in drawn for sample in each], share=True)
    assert len(shared) == 3
    found = {"several": learner.gradient(pieces), "shared": learner.gradient(material.parts(shared))}
    learner.options = replace(learner.options, checkpoint=True)
    found["checkpoint"] = learner.gradient(material.parts(drawn))
    found["both"] = learner.gradient(material.parts(shared))
    for name, (other_loss, other_tokens, other) in found.items():
        assert other_tokens == tokens, name
        assert abs(other_loss - loss) < 1e-5 * loss, name
        assert furthest(flat(other), flat(whole)) < 1e-5 if name != "shared" else True, name
        assert furthest(flat(other), flat(whole)) < 1e-4, name


def _mapped(tree: Any, change: Callable[[str, mx.array], mx.array]) -> Any:
    pairs: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]  # MLX says it may be a table
    return tree_unflatten([(name, change(name, array)) for name, array in pairs])


def test_many_logits_are_made_in_parts(small: VLM, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(QUICK, train=("full", "projector"))
    material, network = prepared(small, rows, options)
    learner = Learner(network, options.resolved(), 10)
    parts = material.parts(material.new[:4])
    loss, _, whole = learner.gradient(parts)
    monkeypatch.setattr("fastvlm_mlx.finetune.loss.LOGIT_ROWS", 5)
    other_loss, _, other = learner.gradient(parts)
    assert abs(loss - other_loss) < 1e-5 * loss and furthest(flat(other), flat(whole)) < 1e-5


def test_the_order_depends_on_the_seed_and_the_place_alone() -> None:
    stream = order(7, 3, 0, 0, 30)
    assert order(7, 3, 0, 11, 9) == stream[11:20] != order(7, 4, 0, 11, 9)
    assert [sorted(stream[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert stream[:7] != stream[7:14]


def test_sequences_of_other_beginnings_go_into_batches_of_their_own(small: VLM, rows: Rows) -> None:
    many = [*rows, *(row | {"system": "Be very brief, please."} for row in rows)]
    samples = samples_of(small.engine, read_rows(many), {})
    batches = list(batches_of(sequences(samples, share=True)))
    assert [batch.prefix.shape[0] for batch in batches] == [6, 6] and batches[0].prefix.shape[1] != batches[
        1
    ].prefix.shape[1]
    assert sum(batch.tokens for batch in batches) == sum(len(sample.places) for sample in samples)
    (alone,) = batches_of(sequences(samples, share=False))
    assert sum(batch.positions for batch in batches) < alone.positions


# A run


def test_it_learns_and_the_model_stays_as_it_is(small: VLM, rows: Rows) -> None:
    before = flat(small.model.parameters())
    asked = [(row["image"], row["question"]) for row in rows[:4]]
    answers = [str(answer) for answer in small.batch(asked, max_tokens=12)]
    options = replace(QUICK, train=("full", "projector"), steps=40, lr=5e-3, eval=rows[:4], eval_every=20, batch=4)
    tuned = tune(small, rows[:4], options)
    assert tuned.before["held_out"]["exact"] == 0 and tuned.after["held_out"]["exact"] == 1
    assert {
        name: array for name, array in before.items() if (array != flat(small.model.parameters())[name]).any()
    } == {}
    assert [str(answer) for answer in small.batch(asked, max_tokens=12)] == answers
    try:
        small.use(tuned.adapter)
        assert [str(answer) for answer in small.batch(asked, max_tokens=12)] == [row["answer"] for row in rows[:4]]
    finally:
        small.use(None)
    assert [str(answer) for answer in small.batch(asked, max_tokens=12)] == answers


@pytest.fixture
def fast_saves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A state after every step."""
    monkeypatch.setattr("fastvlm_mlx.finetune.trainer.SAVE_SECONDS", -1.0)
    yield


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_run_that_ended_goes_on_bit_for_bit(
    small: VLM, rows: Rows, tmp_path: Path, fast_saves: None, how: str
) -> None:
    options = replace(QUICK, steps=8, eval=rows[:2], replay=rows[8:], weight_decay=0.01, eval_every=3)
    tune(small, rows[:8], options, out=tmp_path / "whole")
    error: type[BaseException] = KeyboardInterrupt if how == "interrupted" else SystemExit

    def end(event: dict[str, Any]) -> None:
        if event["step"] == 5 and "seconds" in event:
            raise error

    with pytest.raises(error):
        tune(small, rows[:8], options, out=tmp_path / "ended", listen=end)
    progress = json.loads((tmp_path / "ended" / "state" / "state.json").read_text())
    assert progress["step"] == (5 if how == "interrupted" else 4)
    tuned = tune(small, rows[:8], options, out=tmp_path / "ended", resume=True)
    assert adapter_bytes(tmp_path / "ended") == adapter_bytes(tmp_path / "whole")
    logs = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in file.read_text().splitlines()]
        for file in (tmp_path / "ended" / "log.jsonl", tmp_path / "whole" / "log.jsonl")
    ]
    assert logs[0] == logs[1] and [event["step"] for event in logs[0] if "loss" in event] == list(range(1, 9))
    assert tuned.before and tuned.after
    assert (tmp_path / "ended" / "curve.svg").read_text().startswith("<svg")
    assert len(list((tmp_path / "ended" / "state").glob("*.safetensors"))) == 2


def test_what_a_run_cannot_be_gone_on_with(small: VLM, rows: Rows, tmp_path: Path, apple: Path) -> None:
    out = tmp_path / "run"
    tune(small, rows, QUICK, out=out)
    for options, data, words in (
        (replace(QUICK, lr=1e-3), rows, "another `lr`|a run with `lr`"),
        (replace(QUICK, steps=9), rows, "another length"),
        (QUICK, rows[:9], "other rows"),
    ):
        with pytest.raises(CheckpointError, match=words):
            tune(small, data, options, out=out, resume=True)
    weights = checkpoint.read(apple)
    weights["model.layers.0.mlp.down_proj.weight"] *= 1.25
    mx.save_safetensors(str(apple / "model.safetensors"), weights)
    other = fastvlm_mlx.load(str(apple), dtype="float32")
    with pytest.raises(CheckpointError, match="another base model"):
        tune(other, rows, QUICK, out=out, resume=True)
    with pytest.raises(CheckpointError, match=r"trained on .* whose weights have the digest"):
        other.use(out)
    with pytest.raises(OutputError, match="exists already; give `resume=True`"):
        tune(small, rows, QUICK, out=out)
    with pytest.raises(OutputError, match="no adapter's folder"):
        tune(small, rows, QUICK, out=tmp_path / "nowhere", resume=True)
    before = adapter_bytes(out)
    tune(small, rows, QUICK, out=out, resume=True)  # which was through already
    assert adapter_bytes(out) == before


def test_a_loss_that_is_no_number(small: VLM, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Learner.gradient
    calls = 0

    def gradient(self: Learner, parts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            weight = self.model.projector.linear_2.weight
            self.model.projector.linear_2.weight = weight * float("nan")
            found = original(self, parts)
            return found
        return original(self, parts)

    monkeypatch.setattr(Learner, "gradient", gradient)
    with pytest.raises(
        TrainingError, match=r"Step 4: the loss is not a finite number, and the loss is of row \d+; the state of step 3"
    ):
        tune(small, rows, QUICK, out=tmp_path / "run")
    saved: Any = mx.load(str(tmp_path / "run" / "state" / "step-3.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in saved.values())


def test_a_full_disk_loses_nothing(
    small: VLM, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_saves: None
) -> None:
    out = tmp_path / "run"
    save, calls = mx.save_safetensors, 0

    def full(file: str, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 7:
            Path(file).write_bytes(b"\x10")
            raise RuntimeError("[save_safetensors] no space left on device")
        save(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        with pytest.raises(OutputError, match="is the disk full"):
            tune(small, rows, QUICK, out=out)
    step = json.loads((out / "state" / "state.json").read_text())["step"]
    assert 0 < step < 6
    assert not [path for path in out.rglob("*") if ".new" in path.name]
    tune(small, rows, QUICK, out=out, resume=True)
    tune(small, rows, QUICK, out=tmp_path / "whole")
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")


def test_nothing_better_ends_early_and_the_best_is_kept(small: VLM, rows: Rows) -> None:
    options = replace(QUICK, steps=40, lr=0.5, projector_lr=0.5, warmup=0.0, eval=rows[:2], eval_every=1, patience=3)
    tuned = tune(small, rows[2:], options)
    looks = [event for event in tuned.history if "best" in event]
    assert looks[-1]["step"] == tuned.best_step + 3 < 40
    best = min(looks, key=lambda look: look["held_out"]["loss"])
    assert best["step"] == tuned.best_step and tuned.after["held_out"] == best["held_out"]


def test_several_resolutions_and_minutes(small: VLM, rows: Rows) -> None:
    options = replace(QUICK, steps=None, minutes=0.02, resolution=(64, 128), eval=rows[:1])
    tuned = tune(small, rows, options)
    assert tuned.adapter.config.resolution == 128 and len([e for e in tuned.history if "loss" in e]) >= 1


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base_the_projector_is_dequantised_and_updates_learn(
    apple: Path, rows: Rows, tmp_path: Path, bits: int
) -> None:
    vlm = fastvlm_mlx.load(str(apple), bits=bits, group_size=32, dtype="float32")
    tuned = tune(vlm, rows, replace(QUICK, dora=bits == 8), out=tmp_path / "run")
    assert tuned.adapter.tensors["projector.linear_1.weight"].dtype == mx.float32
    losses = [event["loss"] for event in tuned.history if "loss" in event]
    assert losses[-1] < losses[0]
    again = fastvlm_mlx.load(str(apple), dtype="float32", adapter=tmp_path / "run")  # the unquantised base, too
    assert again.engine.adapter is not None


# What the tower made of pictures


def test_the_tower_sees_a_picture_once(small: VLM, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "features"
    options = replace(QUICK, cache=str(cache))
    first, _ = prepared(small, rows, options)
    fresh = first.features.of(first.pictures.digests, first.pictures.sources)
    again, _ = prepared(small, rows, options)
    assert (first.features.computed, again.features.computed) == (6, 0)
    kept = again.features.of(again.pictures.digests, again.pictures.sources)
    assert all(mx.array_equal(one, two).item() for one, two in zip(fresh, kept, strict=True))
    uncached, _ = prepared(small, rows, replace(options, cache="none"))
    assert uncached.features.computed == 6
    other = VLM(small.engine.at(192))
    assert prepared(other, rows, options)[0].features.computed == 6
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-3])  # damaged: made anew
    damaged, _ = prepared(small, rows, options)
    assert damaged.features.computed == 6
    (folder,) = [each for each in cache.iterdir() if "-128-" in each.name]
    shutil.rmtree(cache)
    prepared(small, rows, options)
    size = next(folder.glob("*")).stat().st_size
    assert features.make_room(cache, 2 * size) == 4 and len(list(folder.glob("*"))) == 2
    shutil.rmtree(cache)
    monkeypatch.setattr(features, "MAX_DISK_BYTES", 3 * size)
    monkeypatch.setattr(features, "CHECK_DISK_BYTES", 1)
    assert prepared(small, rows, options)[0].features.computed == 6 and len(list(folder.glob("*"))) == 3


# Options


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rank": 0}, "rank"), ({"lr": -1}, "lr"), ({"warmup": 2}, "warmup"), ({"train": ("decoder",)}, "train"),
        ({"train": "lora"}, "train"), ({"train": ("lora", "full")}, "train"), ({"stage": "sft"}, "stage"),
        ({"steps": 1, "epochs": 1}, "epochs"), ({"seed": -1}, "seed"), ({"resolution": (100,)}, "resolution"),
        ({"replay_share": 1}, "replay_share"), ({"batch": True}, "batch"), ({"dora": "yes"}, "dora"),
        ({"alpha": None}, "alpha"),
    ],
)  # fmt: skip
def test_options_out_of_their_ranges(options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError) as error:
        TuneOptions(**options)
    assert error.value.option == name


def test_stages_are_presets() -> None:
    align, adapt, full = (TuneOptions(stage=stage).resolved() for stage in ("align", "adapt", "full"))
    assert (align.train, align.projector_lr) == (("projector",), 1e-3)
    assert adapt == replace(TuneOptions().resolved(), stage="adapt") and adapt.train == ("projector", "lora")
    assert full.train == ("projector", "full", "tower") and full.lr == 2e-5
    assert TuneOptions(stage="align", projector_lr=5e-4).resolved().projector_lr == 5e-4
    assert TuneOptions(rank=16, alpha=32, rslora=True).scale == 8


# Another tokenizer


@pytest.mark.parametrize("added", [2, 60], ids=["free rows", "grown"])
def test_another_tokenizer(small: VLM, rows: Rows, tmp_path: Path, added: int) -> None:
    """Its new tokens start from the bytes they were, are learned, and come with the adapter."""
    from tokenizers import Tokenizer as Words

    words = Words.from_str(small.tokenizer.to_json())
    words.add_tokens([f"Wörter{number}" for number in range(added)])
    words.save(str(tmp_path / "tokenizer.json"))
    taught = [{**rows[0], "answer": "Wörter1 Wörter0"}, *rows[1:4]]
    options = replace(QUICK, train=("full", "projector"), steps=40, lr=5e-3, eval=taught, eval_every=20, batch=4)
    tuned = tune(small, taught, options, tokenizer=tmp_path, out=tmp_path / "run")
    vocab = small.config.text.vocab_size
    assert tuned.adapter.config.vocab_size == (vocab if added == 2 else vocab + 64)
    assert tuned.after["held_out"]["exact"] == 1
    vlm = VLM(small.engine.at(128))
    vlm.use(tmp_path / "run")
    answer = vlm.generate(taught[0]["image"], taught[0]["question"], max_tokens=12)
    assert str(answer) == "Wörter1 Wörter0" and len(answer.token_ids) == 4  # two words, the space, the end
    vlm.use(None)
    assert vlm.config.text.vocab_size == vocab and len(vlm.tokenizer) == len(small.tokenizer)
