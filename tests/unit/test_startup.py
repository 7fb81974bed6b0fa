"""Starting stays cheap: heavy libraries are not imported on the way to `--help` and to a local model's first token.

No clock is read here; what each module costs shows in `python -X importtime -m fastvlm_mlx generate --help`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.storage.save import save

# Each takes between a tenth of a second and several seconds to import.
HEAVY = {
    "av", "coremltools", "cv2", "datasets", "fastapi", "gradio", "llguidance", "matplotlib", "mlx_lm", "mlx_vlm",
    "numba", "onnx",
    "onnxruntime", "openvino", "pandas", "prompt_toolkit", "pydicom", "pypdfium2", "requests", "rich", "scipy",
    "sklearn",
    "starlette", "timm", "torch", "torchvision", "transformers", "uvicorn",
}  # fmt: skip
FOR_THE_HUB = {"huggingface_hub", "httpx", "httpx2"}
FOR_OTHER_WORK = {
    "fastvlm_mlx.decoding.attention_map", "fastvlm_mlx.decoding.batch", "fastvlm_mlx.decoding.mapping",
    "fastvlm_mlx.decoding.rows",
    "fastvlm_mlx.decoding.scheduler", "fastvlm_mlx.diagnostics.bench", "fastvlm_mlx.convert",
    "fastvlm_mlx.diagnostics.random_model", "IPython",
}  # fmt: skip
FOR_A_MODEL = {"mlx", "numpy", "PIL", "tokenizers"}

RUN = """
import atexit, json, sys
atexit.register(lambda: open({out!r}, "w").write(json.dumps(sorted(sys.modules))))
sys.argv = ["fastvlm-mlx", *{arguments!r}]
from fastvlm_mlx.cli import main
main()
"""


def imported(code: str, out: Path) -> set[str]:
    """Names of the modules that a fresh process has imported at its end, and their parents."""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return set(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_random("small", layers=1)
    folder = tmp_path_factory.mktemp("startup") / "model"
    save(folder, opened.config, opened.weights(), {"tokenizer.json": opened.tokenizer.to_json()}, nbytes=0)
    return folder


def test_importing_the_package_imports_no_library(tmp_path: Path) -> None:
    out = tmp_path / "modules"
    code = f"import fastvlm_mlx, json, sys; open({str(out)!r}, 'w').write(json.dumps(sorted(sys.modules)))"
    assert not imported(code, out) & (HEAVY | FOR_THE_HUB | FOR_OTHER_WORK | FOR_A_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_imports_only_what_parses(tmp_path: Path, command: str) -> None:
    out = tmp_path / "modules"
    found = imported(RUN.format(out=str(out), arguments=[command, "--help"]), out)
    assert not found & (HEAVY | FOR_THE_HUB | FOR_OTHER_WORK | FOR_A_MODEL)
    assert {name for name in ("generate", "chat") if f"fastvlm_mlx.cli.{name}" in found} == {command}


@pytest.mark.slow
def test_a_local_model_answers_without_heavy_modules(tmp_path: Path, model: Path) -> None:
    picture, out = tmp_path / "picture.png", tmp_path / "modules"
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(picture)
    arguments = ["generate", "-m", str(model), "-i", str(picture), "--max-tokens", "2", "--resolution", "64"]
    found = imported(RUN.format(out=str(out), arguments=arguments), out)
    assert not found & (HEAVY | FOR_THE_HUB | FOR_OTHER_WORK)
    assert found >= FOR_A_MODEL
