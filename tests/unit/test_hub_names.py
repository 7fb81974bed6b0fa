"""What people call a model of the Hub: its name, its address in every form, a revision with either."""

from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.calibrate import estimates
from fastvlm_mlx.errors import HubError, OptionError
from fastvlm_mlx.hub import find as finding
from fastvlm_mlx.hub import huggingface
from fastvlm_mlx.hub.names import hub_model

NAME = "apple/FastVLM-0.5B"
PLACE = "huggingface.co/apple/FastVLM-0.5B"
UNDERSTOOD = {
    f" {NAME} ": None, f"https://{PLACE}.git": None,
    NAME: None, f"{NAME}/": None, f"{NAME}@main": "main", f"{NAME}@refs/pr/3": "refs/pr/3", f"{NAME}/@v1.2": "v1.2",
    f"https://{PLACE}": None, f"http://{PLACE}/": None, PLACE: None, f"HTTPS://www.{PLACE}": None, f"hf://{NAME}": None,
    "https://hf.co/apple/FastVLM-0.5B": None, f"https://{PLACE}?library=transformers#usage": None,
    f"https://{PLACE}@v2": "v2",
    f"https://{PLACE}/tree/main": "main", f"https://{PLACE}/tree/main/": "main",
    f"https://{PLACE}/tree/refs%2Fpr%2F3": "refs/pr/3",
    f"https://{PLACE}/tree/refs/pr/3": "refs/pr/3", f"https://{PLACE}/blob/main/config.json": "main",
    f"https://{PLACE}/tree": None,
    f"https://{PLACE}/resolve/v1/model.safetensors": "v1", f"https://{PLACE}/commit/0a1b2c3": "0a1b2c3",
}  # fmt: skip
NOT = [
    "apple", "apple/", "a/b/c", "/a/b", "", "@main", f"{NAME}@", f"{NAME}@../../x", f"{NAME}@a b", "https://huggingface.co",
    "https://huggingface.co/apple", "https://huggingface.co/datasets/apple/x", "https://huggingface.co/spaces/apple/x",
    "https://github.com/apple/ml-fastvlm", "https://example.com/huggingface.co/a/b", f"https://{PLACE}/tree/main/folder",
    f"https://{PLACE}/discussions/3", f"https://{PLACE}/blob", f"https://{PLACE}/tree/..%2F..%2Fx", "file:///a/b",
]  # fmt: skip


@pytest.mark.parametrize("text", UNDERSTOOD)
def test_understood(text: str) -> None:
    assert hub_model(text) == (NAME, UNDERSTOOD[text])


@pytest.mark.parametrize("text", NOT)
def test_not_a_model_of_the_hub(text: str) -> None:
    assert hub_model(text) is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the Hub's cache is asked for."""
    calls: list[Any] = []

    def found(*arguments: Any) -> Path:
        calls.append(arguments[:2])
        return tmp_path

    monkeypatch.setattr(huggingface, "find", found)
    return calls


def test_finding_by_address(asked: list[Any]) -> None:
    assert finding.find(f"https://{PLACE}/tree/v2").title == NAME
    finding.find(f"{NAME}@v3", revision="v3")
    finding.find(f"{NAME}/", revision="v4")
    assert asked == [(NAME, "v2"), (NAME, "v3"), (NAME, "v4")]


def test_what_cannot_be_found(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give one of them"):
        finding.find(f"{NAME}@v3", revision="v4")
    with pytest.raises(HubError, match="is not the address of a model"):
        finding.find("https://github.com/apple/ml-fastvlm")
    for folder in ("tiny", tmp_path):
        with pytest.raises(OptionError, match="has no revisions; leave `revision` out"):
            finding.find(folder, revision="main")
    assert asked == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("apple/FastVLM-1.5B", "1.5b"), ("https://huggingface.co/apple/FastVLM-7B/", "7b"),
        ("llava-fastvithd_0.5b_stage2", "0.5b"),
        ("mlx-community/FastVLM-0.5B-bf16", "0.5b"), ("apple/FastVLM-1.5B@main", "1.5b"),
    ],
)  # fmt: skip
def test_an_estimate_of_a_published_model(
    name: str, size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert estimates.of(name) == estimates.of(size)
    assert estimates.of(name, resolution=512) == estimates.of(size, resolution=512)
    with pytest.raises(OptionError, match="resolution"):
        estimates.of(name, resolution=100)


@pytest.mark.parametrize("name", ["someone/FastVLM-1.5B-tuned", "apple/FastVLM-7B-int4", "someone/FastVLM-7B"])
def test_no_estimate_of_others(name: str) -> None:
    with pytest.raises(HubError, match=r"Published sizes are 0\.5b, 1\.5b, 7b"):
        estimates.of(name)
