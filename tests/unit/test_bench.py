"""What `bench` and the scripts of benchmarks/ print and write; never how long anything took."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks import charts, checkpoint, compare, redraw, scaling
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.diagnostics import bench, random_model
from fastvlm_mlx.diagnostics.machine import machine
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.vlm import VLM

COMMAND = [
    sys.executable,
    "-m",
    "fastvlm_mlx",
    "bench",
    "--random",
    "small",
    "--rounds",
    "2",
    "--warmup",
    "0",
    "--max-tokens",
    "3",
]
FIGURES = {
    "preprocess_seconds", "vision_seconds", "prefill_seconds", "ttft_seconds", "decode_tokens_per_second",
    "peak_memory_bytes",
    "mlx_peak_memory_bytes",
}  # fmt: skip

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "picture.png"
    Image.new("RGB", (90, 60), "teal").save(path)
    return path


@pytest.fixture(scope="module")
def vlm() -> VLM:
    engine = Engine(random_model.open_random("small", 1))
    engine.load_weights()
    return VLM(engine)


@pytest.mark.slow
def test_json_has_every_stage_at_every_resolution_and_the_machine(picture: Path) -> None:
    arguments = ["--resolution", "64", "--resolution", "128", "--image", str(picture), "--json"]
    done = subprocess.run([*COMMAND, *arguments], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert [result["resolution"] for result in told["results"]] == [64, 128]
    for result in told["results"]:
        assert all(result[name] > 0 for name in FIGURES)
        assert result["load_seconds"] is None  # made, not read
        assert (result["rounds"], result["completion_tokens"]) == (2, 3)
        lowest, highest = result["spread"]["vision_seconds"]
        assert lowest <= result["vision_seconds"] <= highest
    assert {"cpu", "backend", "blas", "memory_bytes"} <= told["machine"].keys()
    assert {"fastvlm-mlx", "mlx", "numpy"} <= told["machine"]["libraries"].keys()


@pytest.mark.slow
def test_table_for_people_goes_to_stdout_and_progress_to_stderr(picture: Path) -> None:
    arguments = ["--resolution", "64", "--image", str(picture), "--image", str(picture), "--bits", "4"]
    done = subprocess.run([*COMMAND, *arguments], check=True, capture_output=True, text=True)
    *_, head, line = done.stdout.splitlines()
    assert head.split()[:3] == ["model", "bits", "size"]
    assert line.startswith("random small")
    assert "64 x2" in line
    assert done.stderr.count("round") == 2


@pytest.mark.slow
def test_layers_belong_to_random_weights() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_mlx", "bench", "-m", "x", "--layers", "2"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "--layers" in done.stderr


@pytest.mark.parametrize(("size", "layers"), [("3b", None), ("small", 0), ("small", 99)])
def test_unknown_sizes_are_refused(size: str, layers: int | None) -> None:
    with pytest.raises(OptionError):
        random_model.config(size, layers)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"warmup": -1}, {"resolution": 100}])
def test_measure_refuses_what_it_cannot_measure(vlm: VLM, settings: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        bench.measure(vlm.engine, [np.zeros((8, 8, 3), np.uint8)], **settings)  # type: ignore[arg-type]


def test_every_round_looks_anew_and_the_model_is_left_as_it_was(vlm: VLM) -> None:
    before = vlm.config
    said: list[str] = []
    result = bench.measure(
        vlm.engine, [bench.made_photo(64, 64)], resolution=64, rounds=2, max_tokens=2, progress=said.append
    )
    assert said == [
        "random small, 1 decoder layers at 64: warm-up",
        "random small, 1 decoder layers at 64: round 1",
        "random small, 1 decoder layers at 64: round 2",
    ]
    assert result.spread["vision_seconds"][0] > 0
    assert vlm.config == before
    assert len(vlm.images) == 0


def test_random_weights_are_the_same_every_time() -> None:
    first, second = (dict(random_model.open_random("small", 1).weights()) for _ in range(2))
    assert all((first[name] == second[name]).all().item() for name in first)


def test_made_photo_is_a_jpeg_of_twelve_megapixels() -> None:
    from io import BytesIO

    with Image.open(BytesIO(bench.made_photo())) as image:
        assert (image.format, image.size) == ("JPEG", (4032, 3024))


def test_durations_have_three_figures() -> None:
    assert [bench.seconds(value) for value in (0.0081, 0.12, 3.4211)] == ["8.1 ms", "120 ms", "3.42 s"]


def test_tower_work_is_what_the_paper_counts() -> None:
    totals = [round(sum(scaling.tower_work(VisionConfig(), side)) / 1e9, 1) for side in (256, 512, 768, 1024)]
    assert totals == [14.8, 59.6, 135.2, 243.4]


@pytest.mark.slow
def test_growth_is_told_from_work(vlm: VLM, tmp_path: Path) -> None:
    measured = scaling.measure(vlm.engine, [64, 128], [1, 2], 64, rounds=1, tokens=2)
    table = scaling.save(measured, vlm.config.vision, machine(), tmp_path)
    assert "| 128 | 4 |" in table.read_text()
    assert len(list(tmp_path.glob("*.svg"))) == 4


@pytest.mark.slow
def test_charts_are_well_formed() -> None:
    pytest.importorskip("matplotlib")
    bars = charts.bars(
        "A < B", "machine", [("vision", {"ours": 1.0, "other": 2.0}), ("prefill", {"ours": 0.1, "other": 0.2})]
    )
    curves = charts.curves(
        "t", "m", "pixels", "s", {"vision": [(256, 0.1), (512, 0.4)], "prefill": [(256, 0.0), (512, 0.1)]}
    )
    trade = charts.trade("t", "MB", "nats", {"4bit": (4.0, 1e-3), "8bit": (8.0, 1e-5)}, ("whole", 16.0))
    assert {"A < B", "machine", "vision", "prefill", "ours", "other", "1.0 s", "200 ms"} <= texts_of(bars)
    assert {"t", "m", "pixels", "s", "256", "512", "vision", "prefill"} <= texts_of(curves)
    assert {"MB", "nats", "4bit", "8bit", "whole"} <= texts_of(trade)


def texts_of(svg: str) -> set[str]:
    """What is written in a drawing."""
    return {"".join(text.itertext()).strip() for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


@pytest.mark.slow
def test_the_recorded_charts_are_those_of_the_recorded_figures() -> None:
    """What they say; the bytes of a drawing are matplotlib's, and another release's may differ."""
    pytest.importorskip("matplotlib")
    drawn = [each for record in redraw.RESULTS.glob("*.json") for each in redraw.charts_of(record)]
    assert {path for path, _ in drawn} == set(redraw.RESULTS.glob("*.svg"))
    for path, svg in drawn:
        assert texts_of(svg) == texts_of(path.read_text(encoding="utf-8")), "run: python -m benchmarks.redraw"
        assert len(svg) < 15_000 and path.stat().st_size < 15_000


def test_a_chart_of_the_same_figures_has_the_same_bytes() -> None:
    pytest.importorskip("matplotlib")
    first, second = (
        charts.curves("title", "machine", "pixels", "s", {"vision": [(256, 0.1), (512, 0.4)]}) for _ in range(2)
    )
    assert first == second and "<metadata>" not in first


@pytest.mark.slow
def test_ours_runs_in_the_comparison_from_a_checkpoint_of_its_own_making(tmp_path: Path) -> None:
    """The whole command without the others, which tests do not install."""
    arguments = ["--random", "small", "--layers", "1", "--resolution", "64", "--rounds", "1", "--max-tokens", "3"]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(compare.__file__).parents[1])
    assert done.stdout.startswith("| | ours |")
    (told,) = tmp_path.glob("*.json")
    medians = json.loads(told.read_text())["medians"]["ours"]
    assert {key for key, _ in (*compare.STAGES, *compare.OTHERS)} <= medians.keys()
    (drawn,) = tmp_path.glob("*.svg")
    ElementTree.parse(drawn)


def test_names_for_transformers() -> None:
    tower = "model.vision_tower.vision_tower.model."
    theirs = "model.vision_tower.timm_model."
    names = {
        tower + "network.7.1.layer_scale_2": "model.vision_tower.timm_model.stages.3.blocks.1.layer_scale_2.gamma",
        tower + "network.5.proj.0.lkb_reparam.bias": f"{theirs}stages.3.downsample.proj.0.reparam_conv.bias",
        tower + "network.9.reparam_conv.bias": "model.vision_tower.timm_model.stages.4.pos_emb.reparam_conv.bias",
        tower + "conv_exp.se.reduce.weight": "model.vision_tower.timm_model.final_conv.se.fc1.weight",
        tower + "network.0.0.convffn.fc1.weight": "model.vision_tower.timm_model.stages.0.blocks.0.mlp.fc1.weight",
        "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
        "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
    }
    assert {name: checkpoint.transformers_name(name) for name in names} == names
