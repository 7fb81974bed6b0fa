"""`fastvlm-mlx tune`: rows of pictures, questions and answers -> an adapter."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, counted
from .messages import BAR_STEPS, bar, note
from .options import DEFAULT_MODEL, ComputeType, Model, Revision, TokenizerPath, Yes, agree_to_download

if TYPE_CHECKING:
    from ..finetune.preview import Preview
    from ..finetune.tune import Tuned


def tune(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="JSON lines or JSON (messages, conversations, or image, question and answer), or a folder: with a "
            "metadata.jsonl, or of pictures with a .txt beside each.",
            show_default=False,
        ),
    ],
    model: Model = DEFAULT_MODEL,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="The adapter's folder to write, with the state of the run.", show_default=False
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="What learns, separated by commas: projector, lora or full (the decoder), tower. "
            "[default: lora,projector]"
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="A preset of the paper's: align (projector), adapt (lora, projector) or full (everything)."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the decoder's low-rank updates.")] = 16,
    alpha: Annotated[float, typer.Option(help="Updates are multiplied with alpha / rank.")] = 32.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="Multiply with alpha / sqrt(rank) instead.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Learn the lengths of the weights' rows apart (DoRA).")] = False,
    layers: Annotated[
        int | None, typer.Option(help="Only the last so many decoder layers get updates. [default: all]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. [default: 2e-4; 2e-5 with full]")] = None,
    projector_lr: Annotated[
        float | None, typer.Option(help="The projector's. [default: 2e-5; 1e-3 with align]")
    ] = None,
    tower_lr: Annotated[float | None, typer.Option(help="The image encoder's. [default: 2e-6]")] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the rate rises; then it falls as a cosine.")
    ] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay, of matrices.")] = 0.0,
    clip: Annotated[float, typer.Option(help="The largest norm of a step's gradient.")] = 1.0,
    epochs: Annotated[float | None, typer.Option(help="Rounds over the rows. [default: 3]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of epochs.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="About so many minutes instead, at the pace of the first steps.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences computed together.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients are added up for a step.")] = 1,
    share: Annotated[
        bool,
        typer.Option("--share", help="A picture and all its questions are one sequence: fewer positions to compute."),
    ] = False,
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint", help="Compute layers twice instead of keeping them: less memory, the same result."
        ),
    ] = False,
    bits: Annotated[
        int | None, typer.Option(help="Quantise the decoder under the updates: 2, 3, 4, 5, 6 or 8.")
    ] = None,
    dtype: ComputeType = None,
    resolution: Annotated[
        list[int] | None,
        typer.Option(help="Side in pixels that pictures are trained at, a multiple of 64; repeat to train at several."),
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            help="Old rows to repeat so that they are not forgotten: data as DATA; none for none. tiny has its own."
        ),
    ] = None,
    replay_share: Annotated[float, typer.Option(help="Of every step, the share of old rows.")] = 0.5,
    eval: Annotated[  # noqa: A002  # what the library calls it
        str | None,
        typer.Option("--eval", help="New rows held out to measure on. [default: of a tenth of the pictures]"),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between two looks at held-out rows. [default: a 20th of all]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="End after so many looks that found nothing better. [default: never]")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="The folder that DATA names its pictures in. [default: DATA's own]")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What asks for the text of a picture that comes with nothing but a text.")
    ] = "Describe the image.",
    cache: Annotated[
        str | None,
        typer.Option(
            help="Where what the image encoder makes of pictures is kept; none for nowhere. [default: in FASTVLM_CACHE]"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its last state.")] = False,
    seed: Annotated[int, typer.Option(help="Decides the order of rows and the first values of updates.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what the run takes, and show the first row as the model reads it; train nothing."
        ),
    ] = False,
    tokenizer_path: TokenizerPath = None,
    config: Annotated[
        str | None,
        typer.Option(help="A JSON or TOML file of these options by name; those of the command line come first."),
    ] = None,
    revision: Revision = None,
    yes: Yes = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fine-tune a model on pictures, questions and answers; what it learned is an adapter.

    Interrupted (Ctrl-C), it saves its state; --resume goes on from there as if nothing had happened. How well held-out
    new rows and old ones are known is measured before and after.

    Example: fastvlm-mlx tune rows.jsonl --model tiny --out my-adapter --epochs 2
    """
    from json import dumps

    from ..decoding.engine import Engine
    from ..finetune.material import samples_at
    from ..finetune.options import TuneOptions
    from ..finetune.preview import preview
    from ..finetune.ranks import join
    from ..finetune.tune import check_target, gather
    from ..finetune.tune import tune as run
    from ..finetune.watchdog import failure
    from ..quantize.recipes import check_bits
    from ..storage.place import target_of

    given = {name: value for name, value in ctx.params.items() if name in TuneOptions.__dataclass_fields__}
    given |= _from_file(config, ctx) if config is not None else {}
    given["train"] = tuple(part.strip() for part in train.split(",")) if (train := given["train"]) is not None else None
    options = TuneOptions(**given | {"resolution": tuple(given["resolution"] or ())}).resolved()
    check_bits(bits)
    join()  # before anything can go wrong in one of several processes alone
    if out is None and not dry_run:
        raise OptionError("There is nowhere to write the adapter; name a new folder as `out`, or use --dry-run.")
    if not dry_run and join().rank == 0:
        check_target(target_of(out or ""), resume)
    engine = Engine.open(model, revision=revision, agree=agree_to_download(yes))
    first = engine.at(options.resolution[0]) if options.resolution else engine
    rows = gather(engine, data, options)
    if dry_run:
        _show(preview(first, rows, options), json)
        return
    samples_at(first, rows)  # what is too long is said before the weights are read
    if resume and out is not None and (failed := failure(target_of(out))) is not None:
        note(f"The last run ended early: {failed}.")
    engine.load_weights(bits=bits, dtype=dtype)  # type: ignore[arg-type]  # checked there
    with bar("Training") as drawn:

        def watch(label: str, done: int, total: int) -> None:
            drawn.label = label
            drawn.update(BAR_STEPS * done // max(1, total) - drawn.pos)

        def listen(event: dict[str, Any]) -> None:
            if "tokens_per_second" in event:
                drawn.label = (
                    f"Step {event['step']}: loss {event['loss']:.3f}, {event['tokens_per_second']:.0f} tokens/s"
                )
                drawn.update(0)
            else:
                note(_look(event))

        try:
            tuned = run(
                engine, data, options, out=out, resume=resume, tokenizer=tokenizer_path, listen=listen, watch=watch
            )
        except KeyboardInterrupt:
            note(f"Interrupted; the state is kept in {out}, and the same command with --resume goes on from there.")
            raise
    if tuned.history:
        print(dumps(report(tuned)) if json else table(tuned))
        print(f"{out}: step {tuned.best_step} is the best. Try: fastvlm-mlx generate --model {model} --adapter {out} "
              "--image PICTURE", file=sys.stderr)  # fmt: skip


def _from_file(path: str, ctx: typer.Context) -> dict[str, Any]:
    """The options of a file that the command line does not give; raises OptionError for names that are none."""
    from pathlib import Path

    from ..errors import listed
    from ..files import paths
    from ..files import regular as files
    from ..files.jsonfile import MAX_JSON_BYTES
    from ..finetune.options import TuneOptions

    file = Path(paths.find(path))
    try:
        text = files.read_text(file, MAX_JSON_BYTES)
        if file.suffix == ".toml":
            import tomllib

            table = tomllib.loads(text)
        else:
            import json

            table = json.loads(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{file}: cannot be read as JSON or TOML ({reason}); check `config`.") from error
    if not isinstance(table, dict):
        raise OptionError(f"{file}: it holds no table of options; check `config`.")
    table = {name.replace("-", "_"): value for name, value in table.items()}
    if strange := table.keys() - set(TuneOptions.__dataclass_fields__):
        raise OptionError(f"{file}: {listed(sorted(strange))} are no options of tune; check `config`.")
    if isinstance(table.get("train"), list):
        table["train"] = ",".join(map(str, table["train"]))
    typed = {name for name in table if ctx.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]
    return {name: value for name, value in table.items() if name not in typed}


def _show(found: "Preview", json: bool) -> None:
    """Print what a run would take."""
    from json import dumps

    from ..diagnostics.machine import in_bytes, usable_memory

    usable = usable_memory()
    if json:
        print(dumps({**found.to_dict(), "usable_memory_bytes": usable}, ensure_ascii=False))
        return
    shortest, median, longest = found.lengths
    fits = (
        ""
        if found.memory_bytes <= usable
        else ": too much; use --checkpoint, a smaller --batch, --bits, or a lower --resolution"
    )
    lines = [
        ("rows", ", ".join(f"{count} {name}" for name, count in found.rows.items() if count)),
        (
            "pictures",
            f"{counted(found.pictures, 'picture')}, {in_bytes(found.cache_bytes)} of the image encoder's results on "
            "disk",
        ),
        (
            "lengths",
            f"{shortest} to {longest} tokens, half of them up to {median}; {found.learned_tokens} tokens to be learned",
        ),
        ("learning", f"{found.parameters / 1e6:.2f} M parameters"),
        ("memory", f"about {in_bytes(found.memory_bytes)} at a step's peak, of {in_bytes(usable)} usable{fits}"),
    ]
    for name, value in lines:
        print(f"{name:<10} {value}")
    print(f"\nThe first row; what stands between ⟦ and ⟧ is learned, the rest is masked:\n\n{found.first}")


def _look(event: dict[str, Any]) -> str:
    """A look at held-out rows in a line."""
    names = {"held_out": "new", "old": "old"}
    parts = [
        f"{names[key]} rows {event[key]['loss']:.3f} nats, {event[key]['exact']:.1%} exact"
        for key in names
        if key in event
    ]
    return f"Step {event['step']}: {'; '.join(parts) or 'nothing is held out to measure on'}"


def report(tuned: "Tuned") -> dict[str, Any]:
    """What a run came to, as a JSON object."""
    return {"out": str(tuned.out), "best_step": tuned.best_step, "before": tuned.before, "after": tuned.after}


def table(tuned: "Tuned") -> str:
    """What a run came to, as Markdown."""
    lines = [
        "| held-out rows | rows | loss before | after | exactly right before | after |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in (("held_out", "new"), ("old", "old")):
        if key in tuned.before and key in tuned.after:
            one, two = tuned.before[key], tuned.after[key]
            lines.append(
                f"| {name} | {one['rows']} | {one['loss']:.3f} | {two['loss']:.3f} | {one['exact']:.1%} | "
                f"{two['exact']:.1%} |"
            )
    if len(lines) == 2:
        return "Nothing was held out to measure on: give more pictures, or rows of --eval."
    return "\n".join(lines)
