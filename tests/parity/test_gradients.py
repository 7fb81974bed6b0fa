"""Gradients of a loaded model on a CPU: of its own forms, of MLX's general ones, and of transformers' model, for every
parameter.

The loss is the cross-entropy of an answer about a picture, through tower, projector and decoder. Gradients of
transformers' own parameters are taken through the production converter's folding, which is differentiated with the
rest.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx import VLM, load
from fastvlm_mlx.backend import cpu
from fastvlm_mlx.backend.cpu import compiler, convolution
from fastvlm_mlx.backend.cpu.tower import CompiledTower
from fastvlm_mlx.backend.linear import Linear
from fastvlm_mlx.backend.ops import gelu, general_forms
from fastvlm_mlx.convert.fold import fold
from fastvlm_mlx.convert.source import Source, open_source
from fastvlm_mlx.inputs.pieces import ImageSlot
from fastvlm_mlx.network.model import FastVLM

from .. import programs
from . import original
from .stages import pixels, prompt_embeddings

pytestmark = pytest.mark.slow

BEFORE, AFTER, ANSWER = [1, 2, 3], list(range(40, 90)), [7, 300, 25, 411]
IMAGE = pixels(192, 256)
POSITIONS = 12  # of a picture of 192 x 256 pixels
LOSS, GRADIENT = 2e-6, 1e-4  # what is promised; sums of float32 in another order differ by less


def loss_of(model: FastVLM) -> mx.array:
    """Nats per token of the answer."""
    images = {0: model.encode(mx.array(IMAGE))[0]}
    embeddings = model.embed([BEFORE, ImageSlot(0, POSITIONS), AFTER, ANSWER], images)
    hidden = model.text(embeddings)[:, -len(ANSWER) - 1 : -1]
    return nn.losses.cross_entropy(model.text.logits(hidden), mx.array([ANSWER]), reduction="mean")


def flattened(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by the path to each."""
    return dict(tree_flatten(tree))


def gradients(model: FastVLM) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and its gradient for every parameter by name."""
    loss, tree = nn.value_and_grad(model, lambda: loss_of(model))()
    return float(loss.item()), {name: np.array(gradient) for name, gradient in flattened(tree).items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |difference| / max |value|."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


PROGRAMS = ("attention", "features", "gelu", "product", "swiglu")  # what a large model is computed by
FORMS = ("depthwise", "gelu")  # what a small one is


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the CPU's forms gave a result; the small model here computes as a large one does.

    Its convolutions would be too small to be cut into strips: that bound is not left here.
    """
    found: Counter[str] = Counter()

    def counted(name: str, form: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*arguments: Any, **options: Any) -> mx.array:
            found[name] += 1
            return form(*arguments, **options)

        return call

    programs.for_any_size(monkeypatch)
    for name in {*PROGRAMS, *FORMS, "quantised_product"}:
        monkeypatch.setattr(cpu, name, counted(name, getattr(cpu, name)))
    monkeypatch.setattr(convolution, "LITTLE", 1)
    monkeypatch.setattr(convolution, "WINDOWS", 1 << 14)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path
) -> tuple[Any, VLM, Source]:
    """A small original, ours loaded from its checkpoint, and the checkpoint as the converter sees it."""
    theirs = original.build(original.SMALL, tied=request.param)
    folder = original.save_apple(theirs, tmp_path_factory.mktemp("gradients") / "apple", tokenizer_files)
    vlm = load(folder, dtype="float32")
    vlm.model.vision.compiled = CompiledTower()  # as that of a large model is
    return theirs, vlm, open_source(folder)


@pytest.mark.parametrize("size", ["large", "small"])
def test_every_parameter_against_the_general_forms(
    pair: tuple[Any, VLM, Source], calls: Counter[str], size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair[1].model
    if size == "small":
        monkeypatch.setattr(compiler, "openvino_module", None)
    loss, ours = gradients(model)
    assert all(calls[name] for name in (PROGRAMS if size == "large" else FORMS))
    calls.clear()
    with general_forms():
        general_loss, general = gradients(model)
    assert not calls
    assert abs(loss - general_loss) < LOSS * general_loss
    assert ours.keys() == general.keys() == model.flat_parameters().keys()
    assert [name for name, gradient in ours.items() if not gradient.any()] == []
    assert {name: d for name in ours if (d := difference(ours[name], general[name])) > GRADIENT} == {}


def test_every_parameter_against_pytorch(pair: tuple[Any, VLM, Source]) -> None:
    """Of the checkpoint's own tensors: the gradient goes back through the folding."""
    theirs, vlm, source = pair
    theirs.zero_grad()
    embeddings = prompt_embeddings(theirs, IMAGE, BEFORE, [*AFTER, *ANSWER])
    hidden = theirs.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -len(ANSWER) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(theirs.lm_head(hidden)[0], torch.tensor(ANSWER))
    expected.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    published = original.apple_names(wanted)

    def loss(tensors: dict[str, mx.array]) -> mx.array:
        vlm.model.update(tree_unflatten(list(fold(dict(tensors), vlm.config))))
        return loss_of(vlm.model)

    before = vlm.model.parameters()
    try:
        tensors = source.tensors()
        if vlm.config.text.tie_word_embeddings:
            del tensors["text.lm_head.weight"]  # which the checkpoint holds all the same
        value, found = mx.value_and_grad(loss)(tensors)
        assert abs(value.item() - expected.item()) < LOSS * expected.item()
        compared = {target: published[name] for target in found if (name := source.name_of(target)) in published}
        assert len(compared) == len(published) > 100
        assert [target for target in compared if not np.array(found[target]).any()] == []
        far = {t: d for t, grad in compared.items() if (d := difference(np.array(found[t]), grad.numpy())) > GRADIENT}
        assert far == {}
    finally:
        vlm.model.update(before)


def test_an_adapter_gets_its_gradient(pair: tuple[Any, VLM, Source]) -> None:
    """Layers that somebody else put in the place of ours, in the decoder and in the tower, with ours frozen."""
    model = pair[1].model

    class Derived(Linear):
        """As PyTorch's way of writing adapters has it: a linear layer that is more than its weights."""

        def __init__(self, layer: nn.Module):
            nn.Module.__init__(self)
            self["weight"], self.bias = layer["weight"], layer["bias"]
            self.a = 0.1 * mx.random.normal((self["weight"].shape[1], len(self["weight"])), key=mx.random.key(2))
            self.freeze(keys=["weight", "bias"])

        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x) + x @ self.a

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module, inputs: int, outputs: int):
            super().__init__()
            self.layer = layer
            self.a = 0.1 * mx.random.normal((inputs, 4), key=mx.random.key(0))
            self.b = 0.1 * mx.random.normal((4, outputs), key=mx.random.key(1))
            layer.freeze()

        def __call__(self, x: mx.array) -> mx.array:
            wide: mx.array = self.layer(x)
            return wide + x @ self.a @ self.b

    mlp, ffn = model.text.layers[1].mlp, model.vision.stages[1].blocks[0].convffn
    derived = model.vision.stages[2].blocks[0].convffn
    whole = [(mlp, "down_proj"), (mlp, "gate_up_proj"), (ffn, "fc1"), (ffn, "fc2"), (derived, "fc1")]
    layers = [getattr(block, name) for block, name in whole]
    try:
        model.freeze()
        for (block, name), layer in zip(whole, layers, strict=True):
            adapter = Derived(layer) if block is derived else Adapter(layer, *reversed(layer["weight"].shape))
            setattr(block, name, adapter)
        for block, name in whole:
            getattr(block, name).unfreeze(recurse=False, keys=["a", "b"])
        _, ours = gradients(model)
        with general_forms():
            _, general = gradients(model)
    finally:
        for (block, name), layer in zip(whole, layers, strict=True):
            setattr(block, name, layer)
        model.unfreeze()
    assert len(ours) == 2 * (len(whole) - 1) + 1 and all(gradient.any() for gradient in ours.values())
    assert {name: d for name in ours if (d := difference(ours[name], general[name])) > GRADIENT} == {}


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_gradient_goes_through_quantised_layers(pair: tuple[Any, VLM, Source], bits: int) -> None:
    """Those of the tower's last norm and of the embeddings, with everything after them quantised."""
    vlm = VLM(pair[1].engine.at(192))
    vlm.engine.load_weights(bits=bits, group_size=32, dtype="float32")
    model = vlm.model
    model.freeze()
    model.vision.stages[4].blocks[0].norm.unfreeze()
    model.text.layers[0].input_layernorm.unfreeze()
    for matrix_is_kept in (True, False):
        for _, module in model.named_modules():
            if hasattr(module, "keeps_dequantised"):
                module.keeps_dequantised = matrix_is_kept
        _, ours = gradients(model)
        with general_forms():
            _, general = gradients(model)
        assert len(ours) == 3 and all(gradient.any() for gradient in ours.values())
        assert {name: d for name in ours if (d := difference(ours[name], general[name])) > GRADIENT} == {}


def test_forward_mode(pair: tuple[Any, VLM, Source]) -> None:
    """What changes along a direction, by `mx.jvp`, is the gradient along it (MLX has no such rule for the stem's
    convolution)."""
    text = pair[1].model.text
    x = pair[1].model.embed([BEFORE, AFTER], {})
    parameters: Any = tree_flatten(text.parameters())
    arrays = [array for _, array in parameters]
    directions = [0.01 * mx.random.normal(array.shape, key=mx.random.key(n)) for n, array in enumerate(arrays)]

    def loss(*arrays: mx.array) -> mx.array:
        text.update(tree_unflatten([(name, array) for (name, _), array in zip(parameters, arrays, strict=True)]))
        return nn.losses.cross_entropy(text.logits(text(x)[:, -4:]), mx.array([ANSWER]), reduction="mean")

    try:
        _, (along,) = mx.jvp(loss, arrays, directions)
        _, backward = mx.vjp(loss, arrays, [mx.array(1.0)])
    finally:
        text.update(tree_unflatten(parameters))
    expected = sum((float(np.array((g * d).sum())) for g, d in zip(backward, directions, strict=True)), 0.0)
    assert abs(float(np.array(along)) - expected) < 1e-4 * abs(expected)


def test_layers_computed_twice(pair: tuple[Any, VLM, Source]) -> None:
    """`mx.checkpoint` of decoder layers without a cache: less memory, the same gradient."""
    model = pair[1].model
    x = model.embed([BEFORE, AFTER], {})

    def loss(
        parameters: dict[str, Any], call: Callable[[Callable[..., mx.array]], Callable[..., mx.array]]
    ) -> mx.array:
        model.text.update(parameters)
        y = x
        for layer in model.text.layers:
            y = call(lambda p, y, layer=layer: (layer.update(p), layer(y, None))[1])(layer.parameters(), y)
        return mx.mean(model.text.norm(y) ** 2)

    parameters = model.text.parameters()
    plain = mx.grad(lambda p: loss(p, lambda f: f))(parameters)
    twice = mx.grad(lambda p: loss(p, mx.checkpoint))(parameters)
    model.text.update(parameters)
    layers = [
        name for name, gradient in flattened(plain).items() if name.startswith("layers.") and mx.any(gradient).item()
    ]
    assert len(layers) > 10
    flat, again = dict(tree_flatten(plain)), dict(tree_flatten(twice))
    assert all(difference(np.array(again[name]), np.array(flat[name])) < 1e-6 for name in layers)


def test_a_compiled_step_takes_the_general_forms(pair: tuple[Any, VLM, Source]) -> None:
    """Which `mx.compile` and `mx.vmap` need: the CPU's own forms evaluate their arguments."""
    model = pair[1].model
    _, expected = gradients(model)

    def step(parameters: dict[str, Any]) -> dict[str, Any]:
        model.update(parameters)
        tree: dict[str, Any] = nn.value_and_grad(model, lambda: loss_of(model))()[1]
        return tree

    parameters = model.parameters()
    try:
        with pytest.raises(ValueError, match=r"eval.*(compile|transform)"):
            mx.compile(step)(parameters)
        model.update(parameters)
        with general_forms():
            found = {name: np.array(gradient) for name, gradient in flattened(mx.compile(step)(parameters)).items()}
    finally:
        model.update(parameters)
    assert {name: d for name in expected if (d := difference(found[name], expected[name])) > GRADIENT} == {}
    pictures = mx.array(np.concatenate([IMAGE, IMAGE[:, ::-1]])[:, None])
    with pytest.raises(ValueError, match=r"vmap|transform"):
        mx.eval(mx.vmap(model.encode)(pictures))
    alone = mx.stack([model.encode(picture) for picture in pictures])
    with general_forms():
        together = mx.vmap(model.encode)(pictures)
    assert difference(np.array(together), np.array(alone)) < 1e-5


def test_the_switch_is_of_one_thread_and_ends_with_its_block(calls: Counter[str]) -> None:
    def own_form() -> bool:
        """Whether the CPU's own form of GELU is taken."""
        calls.clear()
        gelu(mx.ones(3))
        return calls["gelu"] == 1

    with pytest.raises(ZeroDivisionError), general_forms():
        assert not own_form()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(own_form).result()
        raise ZeroDivisionError
    assert own_form()
