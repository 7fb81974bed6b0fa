"""Core ML packages of `tiny`, computed again from the files alone; and what is refused.

Differences are relative to the largest feature. float32 sums in another order: 1e-6 or so. float16 keeps 11 bits, and
a palette of 6 bits is told apart from a wrong one only: what counts there are the answers.
"""

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch", reason="the interpreter convolves by PyTorch")
pytest.importorskip("fastvlm_mlx.export.coremltools").load()

import fastvlm_mlx  # noqa: E402
from fastvlm_mlx import convert_to_coreml  # noqa: E402
from fastvlm_mlx.calibrate.examples import read_questions  # noqa: E402
from fastvlm_mlx.config import VisionConfig  # noqa: E402
from fastvlm_mlx.convert.key_map import APPLE_TOWER  # noqa: E402
from fastvlm_mlx.decoding.loading import open_model  # noqa: E402
from fastvlm_mlx.errors import CheckpointError, FastVLMWarning, ImageError, OptionError, OutputError  # noqa: E402
from fastvlm_mlx.export import coreml, ranges  # noqa: E402
from fastvlm_mlx.export.options import PackageOptions  # noqa: E402
from fastvlm_mlx.export.pictures import measured_on  # noqa: E402
from fastvlm_mlx.hub.find import find  # noqa: E402

from .. import checkpoint  # noqa: E402
from . import features  # noqa: E402
from .interpreter import Package  # noqa: E402

CALIBRATION = Path(fastvlm_mlx.__file__).parent / "tiny" / "calibration"
SIDE = 192
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "float16": {},
    "int8": {"tower_bits": 8},
    "int8, iOS 18": {"tower_bits": 8, "target": "iOS18"},
    "6 bits": {"tower_bits": 6},
    "6 bits, iOS 18": {"tower_bits": 6, "target": "iOS18"},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of `tiny` in each form."""
    root = tmp_path_factory.mktemp("packages")
    return {
        name: convert_to_coreml("tiny", root / f"{place}.mlpackage", **how)
        for place, (name, how) in enumerate(FORMS.items())
    }


@pytest.fixture(scope="module")
def expected() -> features.Array:
    return features.of_mlx(features.encoder_of("tiny"), features.picture(SIDE))


@pytest.mark.parametrize(
    ("form", "most", "cosine"),
    [
        ("float32", 1e-5, 1 - 1e-9),
        ("float16", 5e-3, 0.9999),
        ("int8", 5e-2, 0.998),
        ("int8, iOS 18", 5e-2, 0.998),
        ("6 bits", 2e-1, 0.95),
        ("6 bits, iOS 18", 2e-1, 0.95),
    ],
)
def test_features(packages: dict[str, Path], expected: features.Array, form: str, most: float, cosine: float) -> None:
    found = features.of_package(Package(packages[form]), features.picture(SIDE))
    assert features.difference(found, expected) < most
    assert features.cosine(found, expected) > cosine


def test_rounding_the_weights_alone_costs_little(packages: dict[str, Path], expected: features.Array) -> None:
    found = features.of_package(Package(packages["float16"]), features.picture(SIDE), exact=True)
    assert features.difference(found, expected) < 1e-3


@pytest.mark.parametrize("form", ["float16", "int8", "6 bits"])
def test_answers_stay_the_same(packages: dict[str, Path], form: str) -> None:
    questions = read_questions(CALIBRATION)[::8][:12]
    vlm = fastvlm_mlx.load("tiny", dtype="float32")
    answers = [vlm.generate(question.image, question.text).text for question in questions]
    vlm = fastvlm_mlx.load("tiny", dtype="float32")
    vlm.model["vision"] = features.PackagedTower(Package(packages[form]))
    assert [vlm.generate(question.image, question.text).text for question in questions] == answers


def test_a_flipped_sign_is_seen(packages: dict[str, Path], expected: features.Array, tmp_path: Path) -> None:
    """That the interpreter computes with what the file says: one weight of the stem's second layer, negated."""
    package = Package(packages["float32"])
    (data,) = (packages["float32"] / "Data").rglob("weight.bin")
    content = bytearray(data.read_bytes())
    weight = next(each for each in package.operations if each.outputs[0].name.startswith("patch_embed_1"))
    offset = weight.attributes["val"].blobFileValue.offset
    start = int.from_bytes(content[offset + 16 : offset + 24], "little")
    content[start + 4 * 4 + 3] ^= 0x80  # the centre of the first filter
    copy = tmp_path / "flipped.mlpackage"
    _copy(packages["float32"], copy, bytes(content))
    found = features.of_package(Package(copy), features.picture(SIDE))
    assert features.difference(found, expected) > 1e-3


def test_a_cut_weight_file_is_seen(packages: dict[str, Path], tmp_path: Path) -> None:
    (data,) = (packages["float32"] / "Data").rglob("weight.bin")
    copy = tmp_path / "cut.mlpackage"
    _copy(packages["float32"], copy, data.read_bytes()[:-64])
    with pytest.raises(ValueError, match="no FLOAT32"):
        features.of_package(Package(copy), features.picture(SIDE))


def _copy(package: Path, to: Path, weights: bytes) -> None:
    for file in package.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(weights if file.name == "weight.bin" else file.read_bytes())


def test_what_goes_in_and_what_comes_out(packages: dict[str, Path]) -> None:
    description = Package(packages["float16"]).spec.description
    (images,), (found,) = description.input, description.output
    assert (images.name, list(images.type.multiArrayType.shape)) == ("images", [1, 3, SIDE, SIDE])
    assert (found.name, list(found.type.multiArrayType.shape)) == ("image_features", [1, 9, 512])
    float32 = images.type.multiArrayType.FLOAT32
    assert images.type.multiArrayType.dataType == found.type.multiArrayType.dataType == float32
    assert "MIT License" in description.metadata.license and "tiny" in description.metadata.shortDescription


def test_everybody_may_read_it(packages: dict[str, Path]) -> None:
    for path in (packages["float16"], *packages["float16"].rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)


def test_the_report(packages: dict[str, Path]) -> None:
    path = packages["float16"].with_suffix(".report.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["written_by"] == "fastvlm-mlx" and report["target"] == "coreml" and report["model"] == "tiny"
    assert report["comparison"]["difference"] < 5e-3 and report["comparison"]["cosine"] > 0.9999
    assert report["ranges"]["stream_scales"] == [1.0] * 5 and report["ranges"]["count"] == 9
    assert all(rule["kept"] for rule in report["rules"]) and len(report["rules"]) == 8
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "Core ML itself runs on Macs only and was not asked." in page and "MLModel.load" in page
    exact = json.loads(packages["float32"].with_suffix(".report.json").read_text(encoding="utf-8"))
    assert [rule["name"] for rule in exact["rules"] if not rule["kept"]] == ["float16"]


def test_the_estimate_is_about_what_the_package_gives(packages: dict[str, Path]) -> None:
    opened = open_model(find("tiny"))
    images, _ = measured_on(opened, opened.config.image, None)
    for form in ("float16", "int8"):
        report = json.loads(packages[form].with_suffix(".report.json").read_text(encoding="utf-8"))
        expected = features.of_mlx(features.encoder_of("tiny"), images[0])
        found = features.difference(features.of_package(Package(packages[form]), images[0]), expected)
        assert report["comparison"]["difference"] / 3 < found < report["comparison"]["difference"] * 3


@pytest.mark.parametrize("name", ["input", "projector", "resolution"])
def test_other_forms(tmp_path: Path, name: str) -> None:
    how: dict[str, dict[str, Any]] = {
        "input": {"input": "image"},
        "projector": {"with_projector": True},
        "resolution": {"resolution": 128},
    }
    package = Package(convert_to_coreml("tiny", tmp_path / "other.mlpackage", **how[name]))
    encoder, pixels = features.encoder_of("tiny"), features.picture(128 if name == "resolution" else SIDE)
    expected = features.of_mlx(encoder, pixels)
    images = features.planes(pixels)
    if name == "input":
        assert package.spec.description.input[0].type.imageType.width == SIDE
        images = np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)[None])
    if name == "projector":
        expected = np.array(encoder.embeddings(mx.array(pixels)[None]))
    found = package.run({"images": images})["image_features"]
    assert features.difference(found, expected) < 5e-3


# float16's range.


def scaled(apple: Path, **factors: float) -> Path:
    """The checkpoint with some of the tower's tensors multiplied, by the end of their names."""
    weights = checkpoint.read(apple)
    for ending, factor in factors.items():
        for name in weights:
            if name.startswith(APPLE_TOWER) and name.endswith(ending.replace("__", ".")):
                weights[name] = weights[name] * factor
    checkpoint.save(apple / "model.safetensors", weights)
    return apple


@pytest.mark.filterwarnings("ignore:The range of float16")
def test_a_residual_stream_beyond_float16_is_scaled(apple: Path, tmp_path: Path) -> None:
    """Positions write a stream of some 300,000 in the last stage; the norm in front of attention takes it back."""
    scaled(apple, network__9__reparam_conv__weight=1e6, network__9__reparam_conv__bias=1e6)
    scaled(apple, network__10__0__convffn__conv__conv__weight=1e-6, conv_exp__reparam_conv__weight=1e-6)
    package = Package(convert_to_coreml(apple, tmp_path / "wide.mlpackage"))
    report = json.loads((tmp_path / "wide.report.json").read_text(encoding="utf-8"))
    assert report["ranges"]["streams"][4] > 65504 and report["ranges"]["stream_scales"][4] >= 8
    assert report["ranges"]["stream_scales"][:4] == [1.0] * 4
    pixels = features.picture(128)
    expected = features.of_mlx(features.encoder_of(apple), pixels)
    found = features.of_package(package, pixels)
    assert np.isfinite(found).all() and features.difference(found, expected) < 5e-3
    assert features.cosine(found, expected) > 0.9999


@pytest.mark.filterwarnings("ignore:The range of float16")
def test_a_model_that_no_scale_can_hold_is_refused(apple: Path, tmp_path: Path) -> None:
    scaled(apple, network__10__0__convffn__fc1__weight=1e5)
    with pytest.raises(CheckpointError, match=r"`precision='float16'` cannot hold this model: vision\.stages\.4.*fc1"):
        convert_to_coreml(apple, tmp_path / "out.mlpackage")
    convert_to_coreml(apple, tmp_path / "exact.mlpackage", precision="float32")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"apple", "exact.mlpackage", "exact.report.json", "exact.report.md"}


def test_scales_leave_room() -> None:
    config = VisionConfig(depths=(1, 1, 1, 1, 1), widths=(32, 32, 32, 32, 32))
    readers = dict.fromkeys(ranges.readers(config, 4), 252_866.0)
    others = [path for stage in range(4) for path in ranges.readers(config, stage)]
    found = ranges.Ranges(into=dict.fromkeys(others, 1.0) | readers)
    found.squares["vision.stages.4.blocks.0.norm"] = 32 * 252_866.0**2
    scales = ranges.choose(found, config, with_projector=False)
    assert scales.streams == (1.0, 1.0, 1.0, 1.0, 16.0)
    factor = scales.norms["vision.stages.4.blocks.0.norm"]
    assert 32 * (252_866 * factor) ** 2 <= 65504 / 4 < 32 * (252_866 * factor * 2) ** 2


# What is refused, in one sentence, with nothing left.


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"precision": "bfloat16"}, "`precision` is 'bfloat16', expected one of 'float32', 'float16'"),
        ({"tower_bits": 5}, "`tower_bits` is 5, expected one of '8', '6', '4'"),
        ({"tower_bits": 8, "precision": "float32"}, "`tower_bits` needs `precision='float16'`"),
        ({"input": "video"}, "`input` is 'video'"),
        ({"target": "iOS15"}, "`target` is 'iOS15'"),
        ({"resolution": 100}, "`resolution` is 100"),
        ({"with_projector": "yes"}, "`with_projector` is 'yes'"),
    ],
)
def test_options_outside_their_range(tmp_path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as refused:
        convert_to_coreml("tiny", tmp_path / "out.mlpackage", **how)
    assert str(refused.value).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends in \.mlpackage"):
        convert_to_coreml("tiny", tmp_path / "out.mlmodel")
    taken = tmp_path / "taken.mlpackage"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        convert_to_coreml("tiny", taken)
    with pytest.raises(OutputError, match="is not a Core ML package, so it is not replaced"):
        convert_to_coreml("tiny", taken, force=True)
    assert (taken / "notes.txt").read_text() == "mine"
    with pytest.raises(ImageError, match="cannot be read"):
        convert_to_coreml("tiny", tmp_path / "out.mlpackage", pictures=tmp_path / "nowhere")


def test_a_package_is_replaced_with_force(tmp_path: Path) -> None:
    out = convert_to_coreml("tiny", tmp_path / "out.mlpackage", precision="float32")
    before = sum(file.stat().st_size for file in out.rglob("*"))
    with pytest.warns(FastVLMWarning, match="4 bits changes answers"):
        convert_to_coreml("tiny", out, force=True, tower_bits=4)
    assert sum(file.stat().st_size for file in out.rglob("*")) < before / 5
    assert {path.name for path in tmp_path.iterdir()} == {"out.mlpackage", "out.report.json", "out.report.md"}


def test_weights_that_are_not_finite(apple: Path, tmp_path: Path) -> None:
    scaled(apple, network__0__0__convffn__fc1__bias=float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        convert_to_coreml(apple, tmp_path / "out.mlpackage", precision="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


@pytest.mark.filterwarnings("ignore:The range of float16")
def test_weights_that_float16_cannot_hold(apple: Path, tmp_path: Path) -> None:
    scaled(apple, conv_exp__se__expand__bias=1e7)
    with pytest.raises(CheckpointError, match="cannot hold"):
        convert_to_coreml(apple, tmp_path / "out.mlpackage")
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def test_interrupted(tmp_path: Path) -> None:
    def progress(label: str, share: float) -> None:
        if share >= 0.7:
            raise KeyboardInterrupt

    found = find("tiny")
    with pytest.raises(KeyboardInterrupt):
        coreml.write(open_model(found), found.folder, tmp_path / "out.mlpackage", PackageOptions(), progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(OptionError, match=r"extra 'coreml': pip install 'fastvlm-mlx\[coreml\]'"):
        convert_to_coreml("tiny", tmp_path / "out.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    """Nothing of coremltools reaches stderr; PyTorch, which it would import, is not."""
    out = tmp_path / "fastvithd.mlpackage"
    arguments = ["convert", "tiny", "--to", "coreml", "--out", str(out), "--tower-bits", "8"]
    code = f"""
import sys
from fastvlm_mlx.cli.entry import main
sys.argv = ["fastvlm-mlx", *{arguments!r}]
try:
    main()
finally:
    print({{"torch", "coremltools"}} & sys.modules.keys())
"""
    code = code.replace("    main()", "    import fastvlm_mlx.cli.startup as s\n    s.leave = sys.exit\n    main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "{'coremltools'}\n", done.stderr
    first, *swift = done.stderr.splitlines()
    assert first.endswith("and fastvithd.report.md beside it. In Swift:") and "import CoreML" in swift


def test_under_the_name_that_people_know(tmp_path: Path) -> None:
    from model_export import convert_to_coreml as known

    assert known is convert_to_coreml
    assert known("tiny", str(tmp_path / "fastvithd.mlpackage")).is_dir()


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_itself(packages: dict[str, Path], expected: features.Array) -> None:
    """Predictions, and every operation placed on the Neural Engine where there is one."""
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    units = ct.ComputeUnit.CPU_AND_NE
    for form, most in (("float32", 1e-4), ("float16", 1e-2)):
        model = ct.models.MLModel(str(packages[form]), compute_units=units)
        found = model.predict({"images": features.planes(features.picture(SIDE))})["image_features"]
        assert features.difference(found, expected) < most
    plan = MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units=units)
    placed = [
        plan.get_compute_device_usage_for_mlprogram_operation(operation)
        for operation in plan.model_structure.program.functions["main"].block.operations
    ]
    devices = [type(usage.preferred_compute_device).__name__ for usage in placed if usage is not None]
    assert devices.count("MLNeuralEngineComputeDevice") > 0.9 * len(devices)
