"""`fastvlm-mlx info`: describe a model and the memory it takes, or this machine and what is kept on it."""

from typing import Annotated

import typer

from ..errors import counted
from .messages import BAR_STEPS, bar, one_line, with_flags
from .options import TokenizerPath


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, 'tiny', or a Hub name or archive already in the cache.", show_default=False),
    ] = None,
    tokenizer_path: TokenizerPath = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side in pixels that pictures are brought to: a multiple of 64 from 64 to 4096.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare it with SHA256SUMS or the Hub's digests.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Estimate what every recipe of 'quantize' would make of MODEL; it may also be a published model that "
            "is not on this machine, or a size (0.5b, 1.5b, 7b).",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Describe a model and the memory it takes, or without MODEL this machine and what is kept on it.

    Weights are read only with --verify, and nothing is downloaded.

    Example: fastvlm-mlx info fastvlm-0.5b
    """
    from ..diagnostics.info import describe
    from ..diagnostics.machine import machine_info
    from ..errors import HubError, OptionError

    if estimate:
        from dataclasses import asdict
        from json import dumps

        from ..calibrate import estimates

        if model is None or verify:
            raise OptionError(
                "--estimate takes a model or a size and no --verify, as in 'fastvlm-mlx info 7b --estimate'."
            )
        rows = estimates.of(model, tokenizer=tokenizer_path, resolution=resolution)
        print(dumps([asdict(row) for row in rows]) if as_json else estimates.table(rows))
        return
    if model is None:
        if verify or tokenizer_path or resolution:
            raise OptionError(
                "--verify, --tokenizer-path and --resolution need a model; give one, as in 'fastvlm-mlx info FOLDER "
                "--verify'."
            )
        here = machine_info()
        _print(here.lines(), here.to_dict() if as_json else None)
        return
    from ..files.digests import verify as compare

    try:
        found = describe(model, tokenizer=tokenizer_path, resolution=resolution)
    except HubError as error:
        from ..calibrate.estimates import published_size

        if published_size(model) is None:
            raise
        advice = f"what it would take is estimated by 'fastvlm-mlx info {model} --estimate'"
        raise HubError(f"{str(error).rstrip('.')}; {advice}.") from error
    lines, table = found.lines(), found.to_dict()
    table["verdict"] = with_flags(found.verdict)
    if verify:
        with bar("Verifying") as drawn:
            result = compare(
                found.folder, lambda done, total: drawn.update(done * BAR_STEPS // max(1, total) - drawn.pos)
            )
        unknown = f"; nothing is known of {', '.join(result.unknown)}" if result.unknown else ""
        lines.append(
            (
                "verified",
                f"{counted(result.files, 'file')} {'agrees' if result.files == 1 else 'agree'} with "
                f"{result.against}{unknown}",
            )
        )
        table["verified"] = {"against": result.against, "files": result.files, "unknown": result.unknown}
    _print(lines, table if as_json else None)


def _print(lines: list[tuple[str, str]], table: dict[str, object] | None) -> None:
    """Print `table` as JSON, or else the lines. Names come from outside, so control characters are escaped."""
    import json

    if table is not None:
        print(json.dumps(table))
        return
    for name, value in lines:
        print(f"{name:<16} {one_line(with_flags(value))}")
