"""The readers of the other layouts under attack: whatever a folder holds, one sentence and no folder, or a folder that is whole."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from .. import checkpoint, layouts
from .conftest import Run
from .forkserver import ForkServer
from .test_hostile_folders import (  # noqa: F401  (fixtures)
    BOTH,
    OURS,
    SAYS_OTHERWISE,
    Attack,
    Change,
    _ours,
    header,
    ours,
    poison,
    settings,
    text,
    then,
    weights,
    without,
)

PARTS = ("weight", "scales", "biases")
QUANTISED = layouts.alike(4, 32)
WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "transformers": layouts.transformers,
    "mlx-vlm": layouts.mlx_vlm,
    "mlx-vlm quantised": lambda apple, out: layouts.mlx_vlm(apple, out, QUANTISED),
    "apple-mlx": layouts.apple_mlx,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def _folders(_apple: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    folders = {name: write(_apple, root / name.replace(" ", "-")) for name, write in WRITERS.items()}
    for folder in folders.values():
        (folder / INDEX).unlink(missing_ok=True)  # so that the tests' own changes to the weights go unnoticed by it
    return folders


class Folder:
    """A folder of some layout, the test's own to change, and the attempt to convert it."""

    def __init__(self, run: Run, path: Path, apple: Path, layout: str):
        self.run, self.path, self.layout = run, path, layout
        self.out = path.parent / "out"
        self.options = ["--vision-from", str(apple)] if layout == "apple-mlx" else []

    def refused(self, *says: str, after: tuple[str, ...] = ()) -> None:
        before = sorted(self.path.parent.iterdir())
        self.run("convert", self.path, "--out", self.out, *self.options).refused(*says, after=after)
        assert sorted(self.path.parent.iterdir()) == before

    def refused_or_converted(self) -> None:
        result = self.run("convert", self.path, "--out", self.out, *self.options)
        result.cheap()
        left = {path.name for path in self.path.parent.iterdir()} - {self.path.name}
        if result.code == 0:
            assert left == {"out"} and "Traceback" not in result.err
            self.run("generate", "-m", self.out, "-p", "Hi", "--max-tokens", 1).answered()
        else:
            result.refused(after=("",) * (result.err.count("\n") - 1))
            assert not left


Open = Callable[[str], Folder]


@pytest.fixture
def folder(run: Run, _folders: dict[str, Path], _apple: Path, tmp_path: Path) -> Open:
    return lambda layout: Folder(run, Path(shutil.copytree(_folders[layout], tmp_path / "model")), _apple, layout)


@pytest.mark.parametrize("layout", WRITERS)
def test_in_order(folder: Open, layout: str) -> None:
    """So that what is refused below is refused for what was changed."""
    opened = folder(layout)
    assert opened.run("convert", opened.path, "--out", opened.out, *opened.options).code == 0
    opened.run("generate", "-m", opened.out, "-p", "Hi", "--max-tokens", 1).answered()


@pytest.mark.parametrize(
    "layout", [layout for layout in WRITERS if layout != "mlx-vlm"]
)  # which the quantised one covers
@pytest.mark.parametrize("case", BOTH)
def test_what_breaks_any_folder(folder: Open, layout: str, case: str) -> None:
    change, says = BOTH[case]
    opened = folder(layout)
    change(opened.path)
    opened.refused(says)


def flip(position: float) -> Change:
    """One bit of the header's text, at a part of its length."""

    def change(folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        bit = int(position * length * 8)
        data[8 + bit // 8] ^= 1 << bit % 8
        (folder / "model.safetensors").write_bytes(data)

    return change


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("position", [i / 17 for i in range(17)])
def test_a_bit_flipped_in_the_header(folder: Open, layout: str, position: float) -> None:
    opened = folder(layout)
    flip(position)(opened.path)
    opened.refused_or_converted()


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("bit", range(0, 64, 9))
def test_a_bit_flipped_in_the_headers_length(folder: Open, layout: str, bit: int) -> None:
    opened = folder(layout)
    data = bytearray((opened.path / "model.safetensors").read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (opened.path / "model.safetensors").write_bytes(data)
    opened.refused("model.safetensors")


def each(table: str | None, **values: list[Any]) -> dict[str, tuple[Change, str]]:
    """One case per value of a setting, in a table of config.json or at its top."""
    return {
        f"{key} {value!r}"[:60]: (settings(**({table: {key: value}} if table else {key: value})), key)
        for key, every in values.items()
        for value in every
    }


def only(quantization: Any) -> Change:
    """What config.json says of the quantisation, under both of its names."""
    return lambda folder: [
        (folder / "config.json").write_text(
            json.dumps(
                json.loads((folder / "config.json").read_text())
                | dict.fromkeys(("quantization", "quantization_config"), quantization)
            )
        )
    ]


def put(name: str, new: Callable[[mx.array], mx.array] | None) -> Change:
    """A tensor changed, or taken out."""
    return weights(lambda t: t.pop(name) if new is None else t.update({name: new(t[name])}))


SHAPES: dict[str, Callable[[mx.array], mx.array]] = {
    "turned": lambda a: a.T,
    "flat": lambda a: a.reshape(-1),
    "of another type": lambda a: mx.zeros(a.shape, mx.uint16),
    "a scalar": lambda a: mx.array(1, a.dtype),
    "of no rows": lambda a: a[:0],
    "a row short": lambda a: a[:-1],
}
QUANTIZATIONS: list[Any] = [
    4, [], "4bit", {}, {"bits": 4}, {"group_size": 32}, {"bits": 0, "group_size": 32}, {"bits": 4, "group_size": 0},
    {"bits": -4, "group_size": 32}, {"bits": 4.0, "group_size": 32}, {"bits": True, "group_size": 32},
    {"bits": 1 << 70, "group_size": 32}, {"bits": 4, "group_size": 1 << 40}, {"bits": 4, "group_size": 32, "mode": "x"},
    {"bits": 4, "group_size": 32, "mode": {}}, {"bits": [4], "group_size": [32]},
]  # fmt: skip
UP = "language_model.model.layers.1.mlp.up_proj."
LINEAR = "multi_modal_projector.linear_0.weight"
KERNEL = "vision_tower.vision_model.conv_exp.reparam_conv.weight"
TIMM = "model.vision_tower.timm_model."
SIZES: dict[str, list[Any]] = {
    "hidden_size": [None, 0, -64, 65, 128, 1 << 24, "64", True],
    "num_hidden_layers": [None, 0, 3, 10**9],
    "num_attention_heads": [None, 0, 3, 1 << 30],
    "num_key_value_heads": [None, 0, 3],
    "intermediate_size": [None, 0, 127, 1 << 24],
    "vocab_size": [None, 0, 1, 1 << 24],
    "rms_norm_eps": [None, -1, "small", 1e300],
}
LIES: dict[str, dict[str, tuple[Change, str]]] = {
    "transformers": each("text_config", **SIZES)
    | each(
        "text_config",
        model_type=["llama", 7],
        hidden_act=["gelu"],
        use_sliding_window=[True],
        layer_types=["x", [1], {"a": 1}],
    )
    | each(
        "text_config",
        rope_parameters=[[1], {"rope_type": "yarn"}, {"rope_theta": "big"}, {}, "x"],
        eos_token_id=[5, -1, "end"],
    )
    | each("vision_config", architecture=[None, "vit_base_patch16_224", 7, ["fastvit_mci3"]])
    | each(
        "vision_config",
        model_args=[[1], "x", {"layers": [1]}, {"layers": "11111"}, {"embed_dims": [64] * 5}, {"se_ratio": 1}],
    )
    | each(None, text_config=[None, [], "x", 7], vision_config=["x", 7], projector_hidden_act=["relu"])
    | each(None, image_seq_length=[5, -4, "four", 1 << 70, 4.0, True], vision_feature_layer=[-2, [-1]])
    | each(None, tie_word_embeddings=["yes", 1, False], multimodal_projector_bias=[False])
    | {
        "a broken processor": (text("preprocessor_config.json", "{"), "preprocessor_config.json"),
        "a processor of a list": (text("processor_config.json", '{"image_processor": [1]}'), "image_processor"),
        "a picture of 2 ** 40": (text("preprocessor_config.json", json.dumps({"size": 1 << 40})), "image_size"),
        "a picture of text": (text("preprocessor_config.json", '{"size": "big"}'), "image_size"),
        "a picture of a list": (text("preprocessor_config.json", '{"size": [[1]]}'), "image"),
        "a picture of two sizes": (text("preprocessor_config.json", '{"size": 64, "crop_size": 128}'), "sides"),
        "another mean": (text("preprocessor_config.json", '{"image_mean": "x"}'), "image_mean"),
        "a pipe for a processor": (lambda f: os.mkfifo(f / "preprocessor_config.json"), "pipe"),
        "another tower's names": (weights(lambda t: t.update({TIMM + "stages.5.x": mx.zeros(1)})), "unknown"),
        "a stage too many": (
            weights(lambda t: t.update({TIMM + "stages.4.blocks.9.norm.bias": mx.zeros(1)})),
            "more than",
        ),
        "half in training form": (
            weights(lambda t: t.update({TIMM + "stem.0.conv_kxk.0.conv.weight": mx.zeros(1)})),
            "unknown name",
        ),
    },
    "mlx-vlm": each(None, **SIZES)
    | each(None, mm_vision_tower=[None, "clip", 7], model_type=["fast_vlm", "qwen2"], vision_config=[{"depths": [1]}])
    | {
        "kernels in PyTorch's order": (
            weights(lambda t: t.update({n: a.transpose(0, 3, 1, 2) for n, a in t.items() if a.ndim == 4})),
            "shape",
        ),
        "a kernel without axes": (put(KERNEL, lambda a: a.reshape(-1)), "shape"),
        "no tower": (weights(lambda t: [t.pop(n) for n in list(t) if n.startswith("vision_tower")]), "missing"),
    },
    "mlx-vlm quantised": {
        **{f"quantization {value!r}"[:60]: (only(value), "quantization") for value in QUANTIZATIONS},
        **{
            f"{bits} bits in groups of {group}": (only({"bits": bits, "group_size": group}), "do not fit")
            for bits, group in ((8, 32), (2, 32), (4, 64), (4, 128), (3, 32))
        },
        "no quantization": (settings(quantization=None, quantization_config=None), "quantization"),
        "another mode": (only({"bits": 4, "group_size": 32, "mode": "mxfp4"}), "do not fit"),
        "an exception of text": (only({"bits": 4, "group_size": 32, "mm_projector.0": "8"}), "mm_projector.0"),
        "an exception of nothing": (only({"bits": 4, "group_size": 32, "mm_projector.0": None}), "mm_projector.0"),
        **{f"{part} {what}": (put(UP + part, new), "up_proj") for part in PARTS for what, new in SHAPES.items()},
        **{f"no {part}": (put(UP + part, None), "up_proj") for part in PARTS},
    },
    "apple-mlx": each(None, **SIZES)
    | {
        "half a projector": (put("multi_modal_projector.linear_2.weight", None), "missing"),
        "a projector turned": (put(LINEAR, lambda a: a.T), "linear_0"),
        "half a tower": (
            weights(lambda t: t.update({"vision_tower.vision_model.head.proj": mx.zeros(1)})),
            "unknown name",
        ),
    },
}


# Settings that are possible in themselves: the message names what does not go with them.
OTHERWISE = SAYS_OTHERWISE | {
    "model_args": "",
    "vocab_size": "",
    "tie_word_embeddings": "",
    "rope_parameters": "",
    "model_type": "",
}


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout, cases in LIES.items() for case in cases])
def test_lies(folder: Open, layout: str, case: str) -> None:
    change, says = LIES[layout][case]
    opened = folder(layout)
    change(opened.path)
    opened.refused(OTHERWISE.get(says, says))


@pytest.mark.parametrize(
    ("layout", "name", "value", "named"),
    [
        ("transformers", TIMM + "stem.0.reparam_conv.weight", "nan", "vision.patch_embed.conv.weight"),
        ("mlx-vlm", "language_model.model.norm.weight", "inf", "text.norm.weight"),
        ("mlx-vlm quantised", UP + "scales", "nan", "gate_up_proj.scales"),
        ("mlx-vlm quantised", "mm_projector.0.biases", "-inf", "projector.linear_1.weight"),
        ("apple-mlx", LINEAR, "nan", "projector.linear_1.weight"),
    ],
)
def test_values_that_are_no_numbers(folder: Open, layout: str, name: str, value: str, named: str) -> None:
    opened = folder(layout)
    poison(name, float(value))(opened.path)
    notes = ("fastvlm-mlx: Note: model: quantised layers",) if layout == "mlx-vlm quantised" else ()
    opened.refused(named, "not finite", after=(*notes, "Layout: "))


@pytest.mark.parametrize("case", OURS)
def test_the_way_back_from_a_folder_of_ours(run: Run, ours: Path, tmp_path: Path, case: str) -> None:  # noqa: F811
    change, _ = OURS[case]
    change(ours)
    result = run("convert", ours, "--out", tmp_path / "out", "--to", "transformers")
    result.refused(after=("Layout: fastvlm_mlx",) * (result.err.count("\n") - 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


# Names and links


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("name", ["a\nb", "a\r\x1b[2Jb", "\u202e", "x" * 30_000, "\x00", ""])
def test_tensors_of_odd_names(folder: Open, layout: str, name: str) -> None:
    opened = folder(layout)
    header(lambda t: t.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))(opened.path)
    opened.refused("unknown name")


@pytest.mark.parametrize("layout", WRITERS)
def test_tens_of_thousands_of_tensors(folder: Open, layout: str) -> None:
    opened = folder(layout)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header(lambda t: t.update({f"language_model.model.layers.{i}.x": empty for i in range(25_000)}))(opened.path)
    opened.refused("tensors, FastVLM has at most")


@pytest.mark.parametrize("layout", WRITERS)
def test_folders_and_shards_with_line_ends_in_their_names(folder: Open, layout: str) -> None:
    opened = folder(layout)
    opened.path = opened.path.rename(opened.path.with_name("a\nmodel"))
    names = list(checkpoint.read(opened.path))
    (opened.path / "model.safetensors").rename(opened.path / "a\nshard.safetensors")
    (opened.path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a\nshard.safetensors")}))
    opened.refused_or_converted()
    assert opened.out.exists()
    shutil.rmtree(opened.out)
    (opened.path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a\nother.safetensors")}))
    opened.refused("is missing")


@pytest.mark.parametrize("layout", WRITERS)
def test_links(folder: Open, layout: str, tmp_path: Path) -> None:
    """A folder that is a link, of links, is used, as the Hub's cache is made so; circles and links to nowhere are refused."""
    opened = folder(layout)
    real = opened.path.rename(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for file in real.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    opened.path.symlink_to(tmp_path / "links")
    assert opened.run("convert", opened.path, "--out", opened.out, *opened.options).code == 0
    shutil.rmtree(opened.out)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "links" / file).unlink()
        (tmp_path / "links" / file).symlink_to(file)  # itself
        opened.refused(file)
        (tmp_path / "links" / file).unlink()
        (tmp_path / "links" / file).symlink_to(real / file)
    opened.path.unlink()
    opened.path.symlink_to("model")
    opened.refused()


# PyTorch's own files


@pytest.fixture(scope="module")
def run_with_torch() -> Iterator[Run]:
    """PyTorch, whose import takes seconds, is there already."""
    pytest.importorskip("torch")
    server = ForkServer("torch")
    yield server.run
    server.stop()


class Sleeps:
    """Unpickled, it would wait for ever."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('time').sleep(1e6)",)


def pickled(tensors: dict[str, Any], path: Path, **options: Any) -> None:
    import torch

    torch.save(tensors, path, **options)


def small_tensors() -> dict[str, Any]:
    import torch

    return {"model.norm.weight": torch.zeros(64), "model.embed_tokens.weight": torch.zeros(512, 64)}


def rezipped(
    path: Path, change: Callable[[str, bytes], bytes] = lambda _, data: data, how: int = zipfile.ZIP_STORED
) -> None:
    """The archive with its members changed, or packed in another way."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def write_pickle(case: str, path: Path, evidence: Path) -> None:
    import torch

    tensors = small_tensors()
    if case == "code":
        tensors["x"] = Attack(evidence)
    elif case == "code that waits":
        tensors["x"] = Sleeps()
    elif case == "code in an old archive":
        path.write_bytes(pickle.dumps(Attack(evidence)))
        return
    elif case == "a list":
        pickled([1, 2], path)  # type: ignore[arg-type]
        return
    elif case == "numbers for names":
        tensors[7] = torch.zeros(1)  # type: ignore[index]
    elif case == "a text for a tensor":
        tensors["x"] = "text"
    elif case == "a sparse tensor":
        tensors["x"] = torch.zeros(8, 8).to_sparse()
    elif case == "complex numbers":
        tensors["x"] = torch.zeros(8, dtype=torch.complex64)
    elif case == "a number repeated":
        tensors["x"] = torch.zeros(1).expand(1 << 30)
    elif case == "only a few tensors":
        pass
    pickled(tensors, path, _use_new_zipfile_serialization=case != "the old format")
    data = path.read_bytes()
    if case == "empty":
        path.write_bytes(b"")
    elif case.startswith("cut at "):
        path.write_bytes(data[: len(data) * int(case.split()[2]) // 100])
    elif case.startswith("flipped at "):
        place = len(data) * int(case.split()[2]) // 1000
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
    elif case == "compressed":
        rezipped(path, how=zipfile.ZIP_DEFLATED)
    elif case == "a bomb":
        rezipped(
            path, lambda name, old: old + bytes(100_000_000) if name.endswith("data/0") else old, zipfile.ZIP_DEFLATED
        )
    elif case == "a directory of 1.2 MB":
        with zipfile.ZipFile(path, "a") as archive:
            for i in range(5000):
                archive.writestr(f"{i:0200}", b"")
    elif case == "noise for a pickle":
        rezipped(path, lambda name, old: b"\x80\x02" + bytes(range(200)) if name.endswith("data.pkl") else old)
    elif case == "a storage cut short":
        rezipped(path, lambda name, old: old[:10] if "/data/" in name else old)


PICKLES = {
    "code": "nothing in it was run",
    "code that waits": "nothing in it was run",
    "code in an old archive": "not an archive",
    "the old format": "not an archive",
    "a list": "a list",
    "numbers for names": "expected a table",
    "a text for a tensor": "expected a table",
    "a sparse tensor": "'x'",
    "complex numbers": "'x'",
    "a number repeated": "'x'",
    "only a few tensors": "missing",
    "empty": "not an archive",
    **{f"cut at {percent} %": "pytorch_model.bin" for percent in range(10, 100, 20)},
    "compressed": "compressed",
    "a bomb": "compressed",
    "a directory of 1.2 MB": "not an archive",
    "noise for a pickle": "nothing in it was run",
    "a storage cut short": "pytorch_model",
    **{f"flipped at {mille} in 1000": "" for mille in range(0, 1000, 125)},
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(run_with_torch: Run, apple: Path, tmp_path: Path, case: str) -> None:
    evidence = tmp_path / "executed"
    without("model.safetensors")(apple)
    write_pickle(case, apple / "pytorch_model.bin", evidence)
    Folder(run_with_torch, apple, apple, "llava").refused(PICKLES[case])
    assert not evidence.exists()


def test_pickles_that_could_be_the_weights(run: Run, apple: Path) -> None:
    pytest.importorskip("torch")
    then(without("model.safetensors"), text("a.pt", "x"), text("b.ckpt", "y"))(apple)
    Folder(run, apple, apple, "llava").refused("'a.pt', 'b.ckpt'")
