"""A step of fine-tuning the decoder, ours beside torch + peft: seconds per step and per epoch, and peak memory.

    python -m benchmarks.tune --random 0.5b --resolution 512     # beside torch + peft, each at its best threads
    python -m benchmarks.tune --random 0.5b --layers 4 --scaling --chart out.svg    # ours over rank, length and so on
    python -m benchmarks.tune --mlx-vlm /path/to/a/python/that/has/mlx-vlm   # what its trainer says to a FastVLM

Both learn updates of the decoder's projections (LoRA) and the projector, in float32, with AdamW, on the same rows:
pictures whose features before the projector are at hand, a question and an answer. Only the sizes of the model count,
so its weights are random, and torch has Qwen2 with a projector of the same sizes. Each runs in a process of its own,
one at a time and in turn; figures are medians of the steps after the first. An epoch is as many steps as the pictures
take, its features read from the cache; the first one encodes them as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastvlm_mlx
from fastvlm_mlx.diagnostics.machine import machine, peak_memory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """The sizes of a step."""

    size: str = "0.5b"
    layers: int | None = None
    resolution: int = 512
    batch: int = 4
    text: int = 40  # tokens of a row beside the picture's, of which
    answer: int = 16  # are learned
    rank: int = 16
    checkpoint: bool = False
    steps: int = 4


def main() -> None:
    """Parse, run each in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", default="0.5b", help="a published size")
    parser.add_argument("--layers", type=int, help="keep only so many decoder layers")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps that count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", help="to try; by default one, and as many as there are cores")
    parser.add_argument("--pictures", type=int, default=600, help="of the epoch that is told")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--mlx-vlm", help="a Python that has mlx-vlm")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(
            json.dumps(
                {"ours": ours, "torch": theirs, "encode": encode}[args.worker[0]](Case(**json.loads(args.worker[1])))
            )
        )
        return
    if args.mlx_vlm:
        print(refusal(args.mlx_vlm))
        return
    case = Case(args.random, args.layers, args.resolution, args.batch, rank=args.rank, steps=args.steps)
    if args.scaling:
        scaling(case, args.chart)
        return
    threads = args.threads or sorted({1, os.cpu_count() or 1})
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "torch": []}
    for _ in range(args.rounds):
        for who, results in found.items():
            results += [work(who, case, count) | {"threads": count} for count in threads]
    encoding = work("encode", replace(case, steps=3), max(threads))["seconds"]
    best = {who: min(results, key=lambda each: each["seconds"]) for who, results in found.items()}
    ratio = best["torch"]["seconds"] / best["ours"]["seconds"]
    result = {
        "case": asdict(case),
        "machine": asdict(machine()),
        "runs": found,
        "encode_seconds": encoding,
        "ratio": ratio,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(machine().describe(), f"\n\n{case}\n")
    print(
        f"| | s per step | s per epoch of {args.pictures}, encoding | cached | peak memory | threads "
        "|\n|---|---|---|---|---|---|"
    )
    for who, each in best.items():
        epoch = each["seconds"] * args.pictures / case.batch
        print(f"| {who} | {each['seconds']:.2f} | {epoch + encoding * args.pictures:.0f} | {epoch:.0f} | "
              f"{each['peak'] / 1e9:.2f} GB | {each['threads']} |")  # fmt: skip
    print(f"\ntorch + peft takes {ratio:.1f} times as long for a step.")


def work(who: str, case: Case, threads: int) -> dict[str, Any]:
    """One of them in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    kept |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", "benchmarks.tune", "--worker", who, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, check=False)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(case: Case, positions: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (batch, L), -1 where the picture stands, and the places of the answers' tokens."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (case.batch, positions + case.text)).astype(np.int32)
    start = (case.text - case.answer) // 2
    ids[:, start : start + positions] = -1
    return ids, np.arange(ids.shape[1] - case.answer, ids.shape[1], dtype=np.int32)


def timed(step: Any, steps: int) -> dict[str, Any]:
    """Median seconds of the steps after the first, and the process's peak memory."""
    step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "every": seconds, "peak": peak_memory()}


def ours(case: Case) -> dict[str, Any]:
    """Our step."""
    import mlx.core as mx

    from fastvlm_mlx.decoding.engine import Engine
    from fastvlm_mlx.diagnostics.random_model import open_random
    from fastvlm_mlx.finetune.batches import batches_of
    from fastvlm_mlx.finetune.learner import Learner
    from fastvlm_mlx.finetune.parts import network_to_train
    from fastvlm_mlx.finetune.rows import Exchange, Row
    from fastvlm_mlx.finetune.samples import Sample

    engine = Engine(open_random(case.size, case.layers)).at(case.resolution)
    engine.load_weights(dtype="float32")
    options = fastvlm_mlx.TuneOptions(rank=case.rank, checkpoint=case.checkpoint).resolved()
    network = network_to_train(engine.model, engine.config, options)
    network["vision"] = None  # which is asked for nothing: its results are at hand
    learner = Learner(network, options, 1000)
    ids, places = rows_of(case, engine.image_tokens, engine.config.text.vocab_size)
    row = Row((), (Exchange("", "x"),))
    drawn = [(Sample(each, places, (number,), row),) for number, each in enumerate(ids)]
    shape = (engine.image_tokens, engine.config.vision.out_width)
    features = [mx.random.normal(shape, key=mx.random.key(n)) for n in range(case.batch)]
    mx.eval(features)
    parts = [(batch, [features[picture] for picture in batch.pictures]) for batch in batches_of(drawn)]
    mx.reset_peak_memory()
    return timed(lambda: learner.step(parts), case.steps) | {"mlx_peak": mx.get_peak_memory()}


def theirs(case: Case) -> dict[str, Any]:
    """torch and peft: transformers' Qwen2, PEFT's LoRA, torch's AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tests.parity.conftest  # noqa: F401  # has torchvision importable beside a CPU build of torch
    from fastvlm_mlx.diagnostics import random_model

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = random_model.config(case.size, case.layers)
    text = config.text
    sizes = {name: getattr(text, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size",
        "tie_word_embeddings",
    )}  # fmt: skip
    model = get_peft_model(
        Qwen2ForCausalLM(Qwen2Config(**sizes)).float(),
        LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=TARGETS),
    )
    width = config.vision.out_width
    projector = torch.nn.Sequential(
        torch.nn.Linear(width, text.hidden_size), torch.nn.GELU(), torch.nn.Linear(text.hidden_size, text.hidden_size)
    )
    positions = (-(-case.resolution // 64)) ** 2
    ids, places = rows_of(case, positions, text.vocab_size)
    tokens, features = torch.tensor(ids.astype(np.int64)), torch.randn(case.batch, positions, width)
    optimizer = torch.optim.AdamW(
        [p for p in (*model.parameters(), *projector.parameters()) if p.requires_grad], lr=2e-4
    )
    wanted, before = tokens[:, places], torch.tensor(places.astype(np.int64)) - 1
    base: Any = model.get_base_model()
    if case.checkpoint:
        base.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> None:
        embedded = base.model.embed_tokens(tokens.clamp(min=0))
        embedded = embedded.masked_scatter((tokens < 0)[..., None], projector(features))
        hidden = base.model(inputs_embeds=embedded).last_hidden_state[
            :, before
        ]  # logits of the answer's rows only, as ours
        loss = torch.nn.functional.cross_entropy(base.lm_head(hidden).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()

    return timed(step, case.steps)


def encode(case: Case) -> dict[str, Any]:
    """Our tower on one picture: what the cache saves in every epoch but the first."""
    import mlx.core as mx

    from fastvlm_mlx.decoding.engine import Engine
    from fastvlm_mlx.diagnostics.random_model import open_random

    engine = Engine(open_random(case.size, 1)).at(case.resolution)
    engine.load_weights(dtype="float32")
    pixels = mx.array(np.random.default_rng(0).integers(0, 256, (1, case.resolution, case.resolution, 3), np.uint8))
    return timed(lambda: mx.eval(engine.model.encode(pixels)), case.steps)


def scaling(case: Case, chart: Path | None) -> None:
    """Seconds per step over rank, length, batch and layers, one at a time, as a table and a picture."""
    layers = case.layers or 4
    case = replace(case, layers=layers)
    lines = {
        "rank": [replace(case, rank=n) for n in (4, 16, 64, 128)],
        "text": [replace(case, text=n) for n in (40, 168, 424)],
        "batch": [replace(case, batch=n) for n in (1, 2, 4, 8)],
        "layers": [replace(case, layers=n) for n in sorted({max(1, layers // 2), layers, 2 * layers})],
    }
    points: dict[str, list[tuple[float, float]]] = {}
    for name, cases in lines.items():
        for each in cases:
            seconds = work("ours", each, os.cpu_count() or 1)["seconds"]
            points.setdefault(name, []).append((getattr(each, name) / getattr(cases[0], name), seconds))
            print(f"{name} {getattr(each, name)}: {seconds:.2f} s per step", flush=True)
    if chart is not None:
        from . import charts

        below = f"each against its least: rank 4, 40 tokens of text, 1 sequence, {lines['layers'][0].layers} layers"
        drawn = charts.curves("Time per step of fine-tuning", below, "times the least", "seconds", points)
        chart.write_text(drawn, encoding="utf-8")


REFUSED = """
import sys
import mlx.core as mx
from mlx_vlm import load
from mlx_vlm.trainer.vlm.sft.runtime import vlm_sft_loss
model, processor = load(sys.argv[1])
size = int(sys.argv[2])
ids = mx.array([[1, 2, model.config.image_token_index, 3, 4, 5, 6, 7]])
batch = {"input_ids": ids, "attention_mask": mx.ones(ids.shape, mx.int32), "pixel_values": mx.zeros((1, 3, size, size))}
try:
    vlm_sft_loss(model, batch)
    print("mlx-vlm took it")
except ValueError as error:
    print(f"mlx-vlm refuses: {error}")
"""


def refusal(python: str) -> str:
    """What mlx-vlm makes of a row with a picture: logits of other positions than the labels that its loss pairs them
    with.
    """
    from .checkpoint import prepare, write_random

    with tempfile.TemporaryDirectory() as folder:
        folders = prepare("0.5b", lambda: write_random(Path(folder) / "apple", "0.5b", 1), Path(folder) / "three", 128)
        done = subprocess.run(
            [python, "-c", REFUSED, str(folders["mlx-vlm"]), "128"], capture_output=True, text=True, check=False
        )
    return done.stdout + done.stderr[-1500:]


if __name__ == "__main__":
    main()
