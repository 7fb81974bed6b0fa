"""`fastvlm-mlx serve`: answers over HTTP, in the form of OpenAI's API."""

from contextlib import suppress
from typing import Annotated

import typer

from .messages import note, one_line
from .options import (
    DEFAULT_MODEL,
    MAX_PIXELS,
    Adapter,
    ComputeType,
    MaxPixels,
    Model,
    Resolution,
    Revision,
    TokenizerPath,
    Yes,
    agree_to_download,
)

NEEDED = ("starlette", "uvicorn", "h11", "anyio")


def serve(
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; another than this machine's own (0.0.0.0 for all) lets others in, who "
            "need a key."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes any that is free.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FASTVLM_API_KEY",
            help="A key that requests must have; repeatable, and nothing is shared between keys. Without one, "
            "--host makes one.",
        ),
    ] = None,
    allow_url_images: Annotated[
        bool, typer.Option("--allow-url-images", help="Fetch pictures at public http and https addresses.")
    ] = False,
    max_rows: Annotated[int, typer.Option(help="Answers under way at a time; others wait.")] = 16,
    metrics: Annotated[bool, typer.Option("--metrics", help="Show counters to Prometheus at /metrics.")] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Compute at one width always, so that an answer does not depend on what else is under way."
        ),
    ] = False,
    bits: Annotated[
        int | None, typer.Option(help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8; 0 leaves it as stored.")
    ] = None,
    dtype: ComputeType = None,
    adapter: Adapter = None,
    resolution: Resolution = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    tokenizer_path: TokenizerPath = None,
    revision: Revision = None,
    yes: Yes = False,
) -> None:
    """Answer questions over HTTP, for every program that speaks OpenAI's API.

    Prints its address when it is ready; Ctrl-C stops it. Only this machine is let in unless --host says otherwise.

    Example: fastvlm-mlx serve --model tiny

    For others in the network: fastvlm-mlx serve --host 0.0.0.0 --api-key KEY
    """
    from ..config import check_dtype
    from ..decoding.adapters import find_adapter
    from ..decoding.engine import Engine
    from ..errors import FastVLMError
    from ..inputs.imagefile import check_max_pixels
    from ..quantize.recipes import check_bits

    try:
        from ..serve import server
        from ..serve.keys import new_key
        from ..serve.security import is_loopback
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        raise FastVLMError(
            f"`serve` needs {error.name}, which is not installed; run pip install 'fastvlm-mlx[serve]'."
        ) from error
    check_max_pixels(max_pixels)
    check_dtype(dtype)
    check_bits(bits or None)
    keys = list(api_key or [])
    made = None
    if not is_loopback(host) and not keys:
        made = new_key()
        keys.append(made)
    settings = server.Settings(
        host,
        port,
        keys,
        allow_url_images=allow_url_images,
        max_rows=max_rows,
        exact=exact,
        metrics=metrics,
        max_pixels=max_pixels,
    )
    with server.listen(settings) as listening:
        agree = agree_to_download(yes)
        engine = Engine.open(model, tokenizer=tokenizer_path, revision=revision, resolution=resolution, agree=agree)
        changes = find_adapter(adapter, engine.config)
        if made is not None:
            note(f"The key that requests need: {made}")

        def load() -> None:
            engine.load_weights(bits=bits or None, dtype=dtype)  # type: ignore[arg-type]  # checked
            engine.use(changes)

        def ready() -> None:
            name = one_line(serving.service.names.served)
            with suppress(OSError):  # nobody reads it; the server is there all the same
                print(f"{name} answers at {serving.address} (Ctrl-C stops it)", flush=True)

        serving = server.Serving(engine, listening, settings)
        serving.run(load, ready)
