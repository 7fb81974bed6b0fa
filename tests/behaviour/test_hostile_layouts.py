"""The readers of the other layouts under attack: whatever a folder holds, one sentence and no folder, or a folder that
is whole."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from .. import checkpoint
from ..layouts import WRITERS
from .changes import Change, header, poison
from .folders import Folder
from .forkserver import Run
from .hostile_folders import BOTH, OURS
from .hostile_layouts import LIES, LINEAR, OTHERWISE, TIMM, UP

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"

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
def test_the_way_back_from_a_folder_of_ours(run: Run, ours: Path, tmp_path: Path, case: str) -> None:
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
    """A folder that is a link, of links, is used, as the Hub's cache is made so; circles and links to nowhere are
    refused."""
    opened = folder(layout)
    real = opened.path.rename(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for file in real.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    opened.path.symlink_to(tmp_path / "links")
    assert opened.run("convert", opened.path, "--out", opened.out, *opened.options).code == 0
    shutil.rmtree(opened.out)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "links" / name).unlink()
        (tmp_path / "links" / name).symlink_to(name)  # itself
        opened.refused(name)
        (tmp_path / "links" / name).unlink()
        (tmp_path / "links" / name).symlink_to(real / name)
    opened.path.unlink()
    opened.path.symlink_to("model")
    opened.refused()
