"""A long search for files that break the readers we wrote; deselected unless asked for: python -m pytest -m fuzz.

Whatever comes in, a reader returns or raises a FastVLMError whose message is short, prints nothing, and comes back
soon. FASTVLM_FUZZ_EXAMPLES sets how many examples each search takes (2000).
"""

import json
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm_mlx.config import ImageConfig, ModelConfig, QuantConfig
from fastvlm_mlx.convert import open_foreign, packed, pickles
from fastvlm_mlx.convert.config_map import from_llava, from_transformers
from fastvlm_mlx.convert.key_map import APPLE_TOWER, LAYOUTS, MLX_VLM_TOWER, TIMM_TOWER, match, recognise
from fastvlm_mlx.convert.tokenizer import read_tokenizer
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.files import safetensors, shards
from fastvlm_mlx.files.jsonfile import parse_table
from fastvlm_mlx.inputs.image import load_image, preprocess
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.storage.open import open_ours

from . import pictures

pytestmark = pytest.mark.fuzz

many = settings(
    max_examples=int(os.environ.get("FASTVLM_FUZZ_EXAMPLES", "2000")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=False,
)

NAMES = st.sampled_from(
    [
        "a",
        "model.norm.weight",
        "__metadata__",
        "dtype",
        "shape",
        "data_offsets",
        "content",
        "special",
        "vocab",
        "merges",
    ]
)
NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([1 << 31, (1 << 31) - 1, 1 << 63, 1 << 64, 10**400, -(1 << 63)]),
    st.floats(),
    st.booleans(),
)
TEXTS = st.one_of(
    NAMES,
    st.text(max_size=8),
    st.sampled_from(["F32", "BF16", "U8", "I64", "<|im_end|>", "\ud800", "\x00", "x" * 3000]),
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=5)),
    max_leaves=12,
)


@contextmanager
def orderly(capfd: pytest.CaptureFixture[str], seconds: float = 5.0) -> Iterator[None]:
    """Assert that a FastVLMError is all that comes out, after little computing."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FastVLMError as error:
        assert 20 < len(str(error)) < 3000
    assert time.process_time() - began < seconds
    assert capfd.readouterr() == ("", "")


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """A file with pieces changed, cut out, doubled or put in."""

    @st.composite
    def change(draw: Callable[..., Any]) -> bytes:
        out = bytearray(data)
        for _ in range(draw(st.integers(1, 6))):
            at = draw(st.integers(0, max(0, len(out) - 1)))
            length = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 64, 1000]))
            kind = draw(st.sampled_from(["set", "set", "flip", "cut", "double", "end"]))
            if kind == "set":
                out[at : at + length] = draw(
                    st.one_of(
                        st.binary(min_size=1, max_size=length),
                        st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"]),
                    )
                )
            elif kind == "flip" and out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            elif kind == "cut":
                del out[at : at + length]
            elif kind == "double":
                out[at:at] = out[at : at + length]
            else:
                del out[at:]
        return bytes(out)

    return change()


@pytest.mark.parametrize("kind", [*pictures.FORMATS, "animated GIF", "animated PNG", "animated WEBP", "pages of TIFF"])
def test_pictures(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = pictures.sample(kind) if kind in pictures.FORMATS else pictures.animation(kind.split()[-1])

    @many
    @given(damaged(whole))
    def look(data: bytes) -> None:
        with orderly(capfd):
            pixels = preprocess(load_image(data, max_pixels=4_000_000), ImageConfig(64, "pad"))
            assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8

    look()


@many
@given(st.binary(max_size=300))
def test_bytes_as_pictures(capfd: pytest.CaptureFixture[str], data: bytes) -> None:
    with orderly(capfd):
        load_image(data)


@many
@given(
    header=st.one_of(
        JSON,
        st.dictionaries(
            TEXTS,
            st.fixed_dictionaries(
                {
                    "dtype": TEXTS,
                    "shape": st.lists(NUMBERS, max_size=4),
                    "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
                }
            ),
            max_size=4,
        ),
    ),
    data=st.integers(0, 64),
    length=st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
)
def test_headers(
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    header: object,
    data: int,
    length: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    body = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + bytes(data))
    with orderly(capfd):
        for name, tensor in safetensors.read_header(path).items():
            array = safetensors.load(path)[name]
            mx.eval(array)
            assert array.shape == tensor.shape and array.nbytes == tensor.nbytes


def test_damaged_safetensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever header is let through, MLX reads the file without a complaint."""
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(
        str(path),
        {"a": mx.arange(6.0).reshape(2, 3), "b": mx.ones((4,), mx.bfloat16), "c": mx.array(1)},
        metadata={"format": "pt"},
    )

    @many
    @given(damaged(path.read_bytes()))
    def read(data: bytes) -> None:
        (tmp_path / "damaged.safetensors").write_bytes(data)
        with orderly(capfd):
            headers = safetensors.read_header(tmp_path / "damaged.safetensors")
            arrays = safetensors.load(tmp_path / "damaged.safetensors")
            mx.eval(arrays)
            assert arrays.keys() == headers.keys()

    read()


@many
@given(st.binary(max_size=200))
def test_bytes_as_json(capfd: pytest.CaptureFixture[str], data: bytes) -> None:
    with orderly(capfd):
        parse_table(data, "the file")


@many
@given(
    st.dictionaries(
        st.one_of(TEXTS, st.sampled_from(["weight_map", "metadata"])),
        st.one_of(
            JSON, st.dictionaries(TEXTS, st.sampled_from(["a.safetensors", "../a.safetensors", "\x00", "x" * 300]))
        ),
        max_size=3,
    )
)
def test_indices(tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str], index: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / shards.INDEX).write_text(json.dumps(index))
    with orderly(capfd):
        shards.read_headers(folder)


def nested(table: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A table with some of its entries, at any depth, replaced or missing, and others added."""

    @st.composite
    def change(draw: Callable[..., Any]) -> dict[str, Any]:
        out: dict[str, Any] = json.loads(json.dumps(table))
        for _ in range(draw(st.integers(1, 3))):
            place: Any = out
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                if not keys:
                    break
                key = draw(st.sampled_from(keys))
                if isinstance(place[key], (dict, list)) and draw(st.booleans()):
                    place = place[key]
                    continue
                if draw(st.integers(0, 4)) == 0:
                    del place[key]
                else:
                    place[key] = draw(JSON)
                break
        if draw(st.integers(0, 4)) == 0:
            out[draw(TEXTS)] = draw(JSON)
        return out

    return change()


def test_our_configs(_ours: Path, capfd: pytest.CaptureFixture[str]) -> None:
    @many
    @given(nested(json.loads((_ours / "config.json").read_text())))
    def read(config: dict[str, Any]) -> None:
        with orderly(capfd):
            ModelConfig.from_dict(config)

    read()


def test_apples_configs(_apple: Path, capfd: pytest.CaptureFixture[str]) -> None:
    @many
    @given(nested(json.loads((_apple / "config.json").read_text())))
    def read(config: dict[str, Any]) -> None:
        with orderly(capfd):
            from_llava(config, name="fuzz", layout="llava")

    read()


def test_transformers_configs(_folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pictures_of = {
        "size": {"shortest_edge": 128},
        "crop_size": {"height": 128, "width": 128},
        "image_mean": [0, 0, 0],
        "do_pad": True,
    }

    @many
    @given(nested(json.loads((_folders["transformers"] / "config.json").read_text())), nested(pictures_of))
    def read(config: dict[str, Any], processor: dict[str, Any]) -> None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        with orderly(capfd):
            from_transformers(config, tmp_path, name="fuzz", layout="transformers")

    read()


@many
@given(
    st.dictionaries(
        st.one_of(TEXTS, st.sampled_from(["bits", "group_size", "mode", "a.b"])),
        st.one_of(JSON, st.sampled_from([4, 64])),
    ),
    st.sampled_from(["quantization", "quantization_config"]),
)
def test_quantizations(capfd: pytest.CaptureFixture[str], table: dict[str, Any], key: str) -> None:
    with orderly(capfd):
        packed.settings({key: table}, {"text.embed_tokens.scales": "a.b.scales", "text.norm.weight": "norm.weight"})


@many
@given(
    st.lists(
        st.tuples(st.sampled_from(["U32", "F32", "BF16", "U8"]), st.lists(st.integers(0, 70), max_size=3)),
        min_size=3,
        max_size=3,
    ),
    st.sampled_from([form for forms in packed.FORMS.values() for form in forms]),
    st.sampled_from(list(packed.FORMS)),
)
def test_shapes_of_quantised_layers(
    capfd: pytest.CaptureFixture[str], parts: list[tuple[str, list[int]]], form: tuple[int, int], mode: str
) -> None:
    found = {f"a.{part}": tuple(shape) for part, (_, shape) in zip(packed.PARTS, parts, strict=True)}
    kinds = {f"a.{part}": kind for part, (kind, _) in zip(packed.PARTS, parts, strict=True)}
    with orderly(capfd):
        packed.unpacked_shapes(found, kinds, {"a": QuantConfig(*form, mode)}, {name: name for name in found})


NAME_PARTS = st.sampled_from(
    [
        *(
            APPLE_TOWER,
            TIMM_TOWER,
            MLX_VLM_TOWER,
            "language_model.model.",
            "model.",
            "layers.",
            "network.",
            "stages.",
            "blocks.",
        ),
        *("stem.", "token_mixer", "conv_kxk", "identity", "weight", "bias", "scales", ".", "0", "10", "9" * 30),
        *("{i}", "\n", "\ud800", "é", "x" * 500),
    ]
)


@many
@given(st.lists(st.lists(NAME_PARTS, max_size=6).map("".join), max_size=8), st.sampled_from(list(LAYOUTS)))
def test_names(capfd: pytest.CaptureFixture[str], names: list[str], layout: str) -> None:
    with orderly(capfd):
        match(names, layout)
    with orderly(capfd):
        match(names, recognise(names, LAYOUTS[layout].model_types[0]))


def test_damaged_pickles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    whole = tmp_path / "whole.bin"
    torch.save(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(1)}, whole
    )
    path = tmp_path / "damaged" / "pytorch_model.bin"
    path.parent.mkdir()

    @many
    @given(damaged(whole.read_bytes()))
    def read(data: bytes) -> None:
        path.write_bytes(data)
        with orderly(capfd):
            headers = pickles.read_headers(path.parent)
            arrays = pickles.load(path)
            mx.eval(arrays)
            assert {name: array.shape for name, array in arrays.items()} == {
                name: tensor.shape for name, tensor in headers.items()
            }

    read()


def test_folders_with_changed_configs(
    _apple: Path,
    _ours: Path,
    _folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    readers: list[tuple[Path, Callable[..., Any]]] = [(_apple, open_foreign), (_ours, open_ours)]
    readers += [(folder, open_foreign) for folder in _folders.values()]
    for source, open_it in readers:
        folder = tmp_path / source.name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()

        open_changed(folder, open_it, whole, capfd)


def open_changed(
    folder: Path, open_it: Callable[..., Any], whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    @settings(many, max_examples=many.max_examples // 4)
    @given(nested(whole))
    def read(config: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        with orderly(capfd):
            open_it(folder, "fuzz")

    read()


def test_tokenizer_files(tokenizer_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        for other in tokenizer_files.iterdir():
            (tmp_path / other.name).write_bytes(other.read_bytes())
        whole = (tokenizer_files / file).read_bytes()
        changes = damaged(whole)
        if file != "merges.txt":
            changes = st.one_of(changes, nested(json.loads(whole)).map(lambda table: json.dumps(table).encode()))

        read_changed(tmp_path / file, changes, capfd)


def read_changed(path: Path, changes: st.SearchStrategy[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    @settings(many, max_examples=many.max_examples // 4)
    @given(changes)
    def read(data: bytes) -> None:
        path.write_bytes(data)
        with orderly(capfd):
            words = read_tokenizer(path.parent)
            words.decode(words.encode("What is on the table? 😀\n"))

    read()


def test_tokenizer_json(_ours: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = (_ours / "tokenizer.json").read_bytes()

    @many
    @given(st.one_of(damaged(whole), nested(json.loads(whole)).map(lambda table: json.dumps(table).encode())))
    def read(data: bytes) -> None:
        (tmp_path / "tokenizer.json").write_bytes(data)
        with orderly(capfd):
            words = Tokenizer.open(tmp_path / "tokenizer.json")
            words.decode(words.encode("What is on the table? 😀\n"))

    read()
