"""`fastvlm-mlx info`: what a model is, or what this machine computes with."""

from typing import Annotated

import typer

from .options import TokenizerPath


def info(
    model: Annotated[
        str | None, typer.Argument(help="A folder, 'tiny', or a Hub name already in the cache.", show_default=False)
    ] = None,
    tokenizer_path: TokenizerPath = None,
) -> None:
    """Describe a model, or without MODEL this machine.

    Weights are not read, and nothing is fetched.

    Example: fastvlm-mlx info fastvlm-0.5b
    """
    for name, value in _machine() if model is None else _model(model, tokenizer_path):
        print(f"{name:<16} {value}")


def _machine() -> list[tuple[str, object]]:
    import platform
    from importlib.metadata import version

    from .. import __version__, backend, blas

    packages = ("mlx", "numpy", "pillow", "tokenizers", "huggingface_hub")
    return [
        ("fastvlm-mlx", __version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("backend", backend.current()),
        ("BLAS", blas.status()),
        *((package, version(package)) for package in packages),
    ]


def _model(model: str, tokenizer_path: str | None) -> list[tuple[str, object]]:
    from ..vlm import VLM

    vlm = VLM.open(model, tokenizer=tokenizer_path, cached_only=True)
    config, text = vlm.config, vlm.config.text
    return [
        ("model", vlm.name),
        ("layout", config.source.layout or "fastvlm_mlx"),
        ("licence", config.source.license or "not stated"),
        ("image", f"{config.image.size} pixels, {config.image.fit}: {vlm.image_tokens} tokens"),
        ("tower", f"blocks {config.vision.depths}, channels {config.vision.widths}"),
        ("decoder", f"{text.num_hidden_layers} layers of {text.hidden_size}, context {text.max_position_embeddings}"),
        ("tokenizer", f"{len(vlm.tokenizer)} tokens"),
        ("stored as", config.dtype),
    ]
