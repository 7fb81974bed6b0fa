"""The terms of Apple's weights: said once before their first use, and carried by every converted folder."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_mlx import load
from fastvlm_mlx.config import QuantConfig, SourceConfig
from fastvlm_mlx.convert import convert
from fastvlm_mlx.convert.card import licence_text, model_card
from fastvlm_mlx.diagnostics.random_model import config as random_config
from fastvlm_mlx.errors import FastVLMWarning, HubError
from fastvlm_mlx.hub import caches, licence


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine that has said nothing yet."""
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(licence, "announced", False)
    return tmp_path / "cache"


def said(monkeypatch: pytest.MonkeyPatch, name: str = licence.APPLE) -> list[str]:
    """What a new process would say."""
    monkeypatch.setattr(licence, "announced", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        licence.announce(name)
    return [str(each.message) for each in caught]


def test_once_per_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, "mit") == [] and not cache.exists()
    (notice,) = said(monkeypatch)
    assert "research" in notice and licence.AGREEMENT in notice
    assert said(monkeypatch) == []


def test_once_per_process_where_nothing_can_be_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.touch()  # a file where the folder should be; root may write to folders that are read-only
    assert len(said(monkeypatch)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        licence.announce(licence.APPLE)
    assert len(said(monkeypatch)) == 1


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTVLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(HubError, match="FASTVLM_CACHE"):
        caches.root()
    assert len(said(monkeypatch)) == 1


def test_loading_and_converting_say_it(
    cache: Path, apple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(FastVLMWarning, match=licence.APPLE):
        load(str(apple))
    (cache / "notices" / licence.APPLE).unlink()
    monkeypatch.setattr(licence, "announced", False)
    with pytest.warns(FastVLMWarning, match=licence.APPLE):
        convert(apple, tmp_path / "ours")


@pytest.mark.slow
def test_the_command_says_it_once_on_stderr(cache: Path, apple: Path) -> None:
    command = [sys.executable, "-m", "fastvlm_mlx", "generate", "-m", str(apple), "-p", "Hi", "--max-tokens", "2"]
    first, second = (subprocess.run(command, capture_output=True, check=True, text=True) for _ in range(2))
    assert first.stderr.count("\n") == 2 and licence.AGREEMENT in first.stderr and licence.AGREEMENT not in first.stdout
    assert second.stderr.splitlines() == first.stderr.splitlines()[1:] and second.stdout == first.stdout


def front_matter(card: str) -> dict[str, object]:
    """The entries between the two lines of dashes, as the Hub's client reads them."""
    import yaml  # comes with huggingface_hub

    before, text, _ = card.split("---\n", 2)
    assert before == ""
    return dict(yaml.safe_load(text))


def test_a_card_of_apples() -> None:
    config = replace(random_config("0.5b"), source=SourceConfig("apple/FastVLM-0.5B", "llava", licence.APPLE))
    card = model_card(config)
    assert front_matter(card) == {
        "library_name": "mlx", "pipeline_tag": "image-text-to-text", "license": "apple-amlr",
        "license_name": "apple-amlr",
        "license_link": "LICENSE", "base_model": "apple/FastVLM-0.5B", "tags": ["mlx", "fastvlm", "fastvlm-mlx"],
    }  # fmt: skip
    for part in (
        licence.ATTRIBUTION,
        licence.AGREEMENT,
        "## Changes",
        "Nothing was trained",
        "fastvlm-mlx generate --model",
    ):
        assert part in card
    assert "## Quality" not in card


def test_a_card_of_a_quantised_folder() -> None:
    plan = {"text.embed_tokens": QuantConfig(8, 64), "text.layers.0.mlp.down_proj": QuantConfig(4, 64)}
    config = replace(random_config("0.5b"), source=SourceConfig("a/b", "llava", "mit"), quantization=plan)
    card = model_card(config, quality="| bits | same answers |\n|---|---|\n| 4 | 97 % |\n")
    entries = front_matter(card)
    assert (
        entries["license"] == "mit" and "license_name" not in entries and entries["base_model_relation"] == "quantized"
    )
    assert entries["tags"] == ["mlx", "fastvlm", "fastvlm-mlx", "4-bit", "8-bit"]
    assert "## Quality\n\n| bits | same answers |" in card and "2 layers were quantised" in card
    assert "1 layer in 4 bits, 1 layer in 8 bits" in card and licence.ATTRIBUTION not in card


@pytest.mark.parametrize("odd", ["x\n---\nlicense: mit", 'a"b', "a: b", "- [", "\u2028", "né/é", "x" * 5000, ""])
def test_names_and_licences_from_outside_stay_values(odd: str) -> None:
    entries = front_matter(model_card(replace(random_config("small"), source=SourceConfig(odd, "llava", odd))))
    assert entries["license"] == "other" and entries["license_name"] == odd and "base_model" not in entries


def test_the_agreement_is_carried_or_pointed_to(apple: Path, tmp_path: Path) -> None:
    config = replace(random_config("small"), source=SourceConfig("x", "llava", licence.APPLE))
    assert licence.AGREEMENT in licence_text(apple, config) and licence.ATTRIBUTION in licence_text(apple, config)
    (apple / "LICENSE_MODEL").write_text("the agreement itself")
    assert licence_text(apple, config) == "the agreement itself"


def test_a_link_for_a_licence_is_followed_only_within_the_hubs_cache(tmp_path: Path) -> None:
    config = replace(random_config("small"), source=SourceConfig("x", "llava", licence.APPLE))
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    for folder in (snapshot, blobs, tmp_path / "blobs"):
        folder.mkdir(parents=True)
    for secret in (tmp_path / "key", tmp_path / "blobs/key"):
        secret.write_text("secret")
    (blobs / "aa").write_text("the agreement itself")
    for target, carried in (("../../../key", False), ("../../../blobs/key", False), ("../../blobs/aa", True)):
        (snapshot / "LICENSE").unlink(missing_ok=True)
        (snapshot / "LICENSE").symlink_to(target)
        assert (licence.AGREEMENT not in licence_text(snapshot, config)) == carried, target
