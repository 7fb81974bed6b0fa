"""`fastvlm-mlx batch`: an answer about every picture of a folder, a pattern or a list."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError, PromptError, counted, listed, shown
from ..files.regular import write as write_text
from .messages import note, one_line, say, with_flags
from .options import (
    DEFAULT_MODEL,
    MAX_PIXELS,
    Adapter,
    ComputeType,
    Load4Bit,
    Load8Bit,
    MaxPixels,
    MaxTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Resolution,
    Revision,
    Schema,
    Seed,
    Stop,
    System,
    Temperature,
    TokenizerPath,
    TopK,
    TopP,
    Yes,
    agree_to_download,
    one_of_bits,
    schema_named,
)

if TYPE_CHECKING:
    from ..folder.job import Tally
    from ..folder.listing import Listing
    from ..folder.output import Output, Printed
    from ..folder.share import Share

PROMPT = "Describe the image."
FORMS = ("txt", "jsonl", "csv")
EXISTING = ("skip", "overwrite", "append", "prepend")
STDOUT = "-"
SOME_FAILED = 3  # the exit code


def batch(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures, a pattern in quotes, a list (text, JSON lines or CSV), or '-' for a list on "
            "stdin.",
            show_default=False,
        ),
    ],
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question about each picture.", show_default=PROMPT)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A text file with several questions, one a line, all asked about each picture.")
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(
            help="txt: a text beside each picture; jsonl: JSON lines; csv: a table. By default as --out ends, or jsonl."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write, with txt a folder for the texts, or '-' for stdout; by default "
            "fastvlm-batch.jsonl or .csv in the folder, and texts beside the pictures.",
        ),
    ] = None,
    existing: Annotated[
        str | None,
        typer.Option(
            help="What becomes of answers that were made in another way, and of texts by others: skip, overwrite, "
            "append or prepend. By default the former are made anew, the latter kept."
        ),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Take pictures in folders below, too.")] = False,
    prefix: Annotated[str, typer.Option(help="Put this before every answer.")] = "",
    suffix: Annotated[str, typer.Option(help="Put this behind every answer.")] = "",
    strip_start: Annotated[
        list[str] | None,
        typer.Option(help="Cut this from the beginning of answers; may be given several times.", show_default=False),
    ] = None,
    forbid: Annotated[
        str | None,
        typer.Option(help="A text file with forbidden phrases, one a line: asked again, then dropped and logged."),
    ] = None,
    keep_repeats: Annotated[
        bool, typer.Option("--keep-repeats", help="Do not ask again where an answer repeats a phrase again and again.")
    ] = False,
    fail_on: Annotated[
        str, typer.Option(help="any: exit with 3 where some pictures failed; none: with 0 all the same.")
    ] = "any",
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: the i-th of n shares only, i from 1 on; each may run on a machine of its own. Under mlx.launch "
            "each process takes its own."
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Items decoded ahead, which bounds the memory.")] = 32,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    schema: Schema = None,
    system: System = None,
    bits: Annotated[
        int | None, typer.Option(help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8; 0 leaves it as stored.")
    ] = None,
    load_4bit: Load4Bit = False,
    load_8bit: Load8Bit = False,
    dtype: ComputeType = None,
    adapter: Adapter = None,
    resolution: Resolution = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    tokenizer_path: TokenizerPath = None,
    revision: Revision = None,
    yes: Yes = False,
) -> int:
    """Answer questions about every picture of a folder, and go on where it was when it is started again.

    What is written is whole at any moment. A picture that cannot be used is logged and passed over.

    Example: fastvlm-mlx batch photos --write txt --prompt "Describe the image in one sentence."

    Into one table: fastvlm-mlx batch "parts/*.jpg" --schema part.json --out parts.csv

    On three Macs: fastvlm-mlx batch photos --shard 2/3
    """
    from ..config import check_dtype, is_whole
    from ..decoding.adapters import find_adapter
    from ..decoding.engine import Engine
    from ..decoding.request import Options
    from ..folder import captions, listing, recipe
    from ..folder.job import Work, run
    from ..folder.lines import fields_of
    from ..folder.output import Output, Printed, Target
    from ..inputs.imagefile import check_max_pixels
    from ..inputs.prompt import Turn
    from ..quantize.recipes import check_bits

    for name, value, choices in (
        ("existing", existing, EXISTING),
        ("fail_on", fail_on, ("none", "any")),
        ("write", write, FORMS),
    ):
        if value is not None and value not in choices:
            raise OptionError(f"`{name}` is {shown(value)}, expected one of {listed(choices)}.")
    if not is_whole(window) or window < 1:
        raise OptionError(f"`window` is {shown(window)}, expected a whole number of pictures of at least 1.")
    if prompt is not None and prompts is not None:
        raise OptionError("`prompt` and `prompts` were given together; choose one.")
    if prompt is not None and not prompt.strip():
        raise PromptError("`prompt` is empty; give a question, or leave it out to have the pictures described.")
    if out == STDOUT and write == "txt":
        raise OptionError("`write='txt'` writes files, and `out='-'` is stdout; leave one of them out.")
    bits = one_of_bits(bits, load_4bit, load_8bit)
    options = Options(
        max_tokens,
        temperature,
        top_p,
        seed,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        schema=schema_named(schema),
    )
    check_max_pixels(max_pixels)
    check_dtype(dtype)
    check_bits(bits or None)
    rules = captions.Rules(
        prefix, suffix, captions.listed_starts(strip_start), captions.read_forbidden(forbid), not keep_repeats
    )
    asked = listing.read_prompts(prompts) if prompts is not None else [PROMPT if prompt is None else prompt]
    own = _own_share(shard)
    found = listing.find(source, asked, recursive=recursive)
    form = write or ("csv" if out is not None and out.lower().endswith(".csv") else "jsonl")
    engine = Engine.open(
        model, tokenizer=tokenizer_path, revision=revision, resolution=resolution, agree=agree_to_download(yes)
    )
    for each in asked:
        engine.render([Turn(each, 1)], system)
    changes = find_adapter(adapter, engine.config)
    made = recipe.recipe_of(
        engine,
        options,
        rules,
        system=system,
        loaded=f"{bits or ''} {dtype or ''}",
        adapter="" if changes is None else changes.digest,
    )
    work = Work(options, rules, made, system=system, adapter=adapter, window=window, max_pixels=max_pixels)
    fields = fields_of(options.schema if isinstance(options.schema, str) else None)

    def load_weights() -> None:
        if engine.adapter is None:
            engine.load_weights(bits=bits or None, dtype=dtype)  # type: ignore[arg-type]  # checked
            engine.use(changes)

    if changes is not None:  # which may bring the tokenizer that questions are prepared with
        load_weights()
    with ExitStack() as held:
        output: Output | Printed
        if out == STDOUT:
            output = Printed(form, fields, own)
        else:
            output = held.enter_context(Output(Target.of(found.root, form, out, existing, own), made, fields))
        tally = _drawn(run(engine, found.items, output, work, load_weights), found, output, own)
        last = isinstance(output, Printed) or _finished(output, found, tally, max_pixels)
    alone = shard is not None or own.count == 1  # else mlx.launch would end the other processes
    return SOME_FAILED if tally.failed and fail_on == "any" and (alone or last) else 0


def _own_share(shard: str | None) -> "Share":
    """The share of this process, by --shard or by `mlx.launch`."""
    from ..folder import share

    launched = share.launched()
    if launched is not None and shard is not None:
        raise OptionError(f"`shard` was given under mlx.launch, by which this process has {launched}; leave it out.")
    return launched or share.parse(shard)


def _drawn(tallies: "Iterator[Tally]", found: "Listing", output: "Output | Printed", own: "Share") -> "Tally":
    """Go through a run with a bar of items, their rate, failures and the time left; returns what it did."""
    from .. import progress
    from ..folder.job import Tally

    tally = Tally()
    total = None if found.count is None else sum(own.holds(item.name) for item in found.items)

    def figures() -> str:
        rate, done = tally.per_minute, tally.answered + tally.failed
        left = None if total is None or not rate else (total - done - output.settled) / rate
        return f"{rate:.0f}/min, {tally.failed} failed" + ("" if left is None else f", {_minutes(left)} left")

    try:
        with progress.bar("Answering", total, figures) as track:
            for tally in track(tallies):  # noqa: B007  (the last one counts)
                pass
    except KeyboardInterrupt:
        say(f"Interrupted: {counted(tally.answered, 'item')} of this run written; the same command goes on from there.")
        raise
    return tally


def _minutes(minutes: float) -> str:
    """A time as "40 s", "12 min" or "3 h 5 min"."""
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 60 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def _finished(output: "Output", found: "Listing", tally: "Tally", max_pixels: int) -> bool:
    """Put the output in order and print the report; returns whether it is complete, with all shares."""
    from ..folder.page import page
    from ..folder.report import report

    path = output.target.path
    missing = output.finish(lambda: (item.name for item in found.items))
    if missing is not None:
        own = output.target.share
        state = "the others are at work, and the last one puts all together"
        if missing:
            state = f"{', '.join(map(str, missing))} have items without an answer: start them, or all without --shard"
        note(f"Share {own} is done ({counted(tally.answered, 'item')}, {tally.failed} failed); {state}.")
    else:
        whole = report(output.ledger.lines())
        summary = whole.text(tally, output.done, output.kept)
        for line in summary.splitlines():
            note(one_line(with_flags(line)))
        if whole.answers or whole.failed:
            shown_at = path.with_name(f"{path.stem}.report.html")
            write_text(shown_at, page(whole, summary, f"{path.name}: {output.target.root}", max_pixels))
            note(f"To look through: {one_line(str(shown_at))}")
    if tally.failed:
        log = path if missing is None else output.target.share.file(path)
        say(f"{counted(tally.failed, 'item')} of {tally.failed + tally.answered} failed; the reasons are in {log}.")
    return missing is None
