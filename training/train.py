"""Train ``tiny``: ``python -m training.train --run runs/tiny --minutes 120``.

Resumes from the run folder's ``state.pt`` where there is one. The learning rate warms up, stays, and falls to zero
over the last ``--decay-minutes``; the state from before the fall is kept as ``state-before-decay.pt`` so that a later
run can go on from it. SIGTERM saves the state and ends. ``train.log`` grows by a line of losses and exact-match shares
every ``--log-steps`` steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import signal
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from training import compact
from training import tokenizer as bpe
from training.data import (
    IGNORE,
    NO_CHARACTER,
    NO_PLACE,
    Batch,
    World,
    additive_mask,
    fixed_items,
    make_batch,
    positions,
)
from training.model import Auxiliary, AuxiliarySizes, FastVLM, ModelConfig
from training.questions import corpus
from training.world import Options

LOG = logging.getLogger("training")
WEIGHTS = {  # of the auxiliary losses, beside 1 for the language model's
    "objects": 0.5,
    "places": 1.0,
    "columns": 0.3,
    "count": 0.3,
    "string": 0.05,
    "middle_shape": 0.15,
    "middle_colour": 0.15,
    "middle_columns": 0.25,
    "fine_shape": 0.15,
    "fine_colour": 0.15,
    "fine_columns": 0.25,
}
STATE, BEFORE_DECAY = "state.pt", "state-before-decay.pt"


def balanced(logits: Tensor, target: Tensor, nothing: int) -> Tensor:
    """Cross-entropy where most places hold "nothing": the mean over things plus the mean over nothings."""
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    things, nothings = (
        (target.flatten() != nothing).float(),
        (target.flatten() == nothing).float(),
    )  # IGNORE has a loss of 0
    return (loss * things).sum() / things.sum().clamp(min=1) + (loss * nothings).sum() / nothings.sum()


def auxiliary_losses(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], sizes: AuxiliarySizes
) -> dict[str, Tensor]:
    """One loss per auxiliary head."""
    objects = F.binary_cross_entropy_with_logits(outputs["objects"], targets["objects"], reduction="none")
    objects = objects * (targets["objects"] != IGNORE)
    present = (targets["places"] != NO_PLACE).float()
    distance = F.smooth_l1_loss(outputs["places"], targets["places"], beta=0.1, reduction="none")
    losses = {
        "objects": objects.sum((1, 2)).mean() / 5,
        "places": (distance * present).sum() / present.sum().clamp(min=1),
        "columns": balanced(outputs["columns"], targets["columns"], NO_CHARACTER),
        "count": F.cross_entropy(outputs["count"].flatten(0, 1), targets["count"].flatten()),
        "string": balanced(outputs["string"], targets["string"], NO_CHARACTER),
    }
    for level in ("fine", "middle"):
        things = outputs[f"{level}_objects"]
        columns = balanced(outputs[f"{level}_columns"], targets[f"{level}_columns"], NO_CHARACTER)
        losses |= {
            f"{level}_shape": balanced(things[..., : sizes.shapes + 1], targets[f"{level}_shape"], sizes.shapes),
            f"{level}_colour": balanced(things[..., sizes.shapes + 1 :], targets[f"{level}_colour"], sizes.colours),
            f"{level}_columns": columns,
        }
    return losses


def answer_logits(model: FastVLM, cells: Tensor, batch: Batch) -> Tensor:
    """Logits (answer tokens, V) at every place of the batch that has a label."""
    prefix = batch.before.shape[1] + cells.shape[1]
    embeddings = model.embed(cells, batch.before, batch.after)
    states = model.hidden(embeddings, additive_mask(batch.block, prefix), positions(batch.offset, prefix))
    logits: Tensor = model.decoder.lm_head(states[:, prefix:][batch.labels != IGNORE])
    return logits


def without(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits (N, V) with one token of each row left out, none where ``tokens`` (N,) is -100."""
    left_out = F.one_hot(tokens.clamp(min=0), logits.shape[-1]).bool() & (tokens != IGNORE)[:, None]
    return logits.masked_fill(left_out, -torch.inf)


def to_pixels(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32, 0-1, channels last."""
    return (pixels.float() / 255).contiguous(memory_format=torch.channels_last)


def count_exact(logits: Tensor, batch: Batch, right: dict[str, int], asked: dict[str, int]) -> None:
    """Add to ``right`` and ``asked`` per kind: an answer counts if all of its tokens are the likeliest."""
    chosen = torch.zeros_like(batch.labels)
    chosen[batch.labels != IGNORE] = logits.argmax(-1)
    wrong = (batch.labels != IGNORE) & (chosen != batch.labels)
    for row, kinds in enumerate(batch.kinds):
        wrong_blocks = set(batch.block[row][wrong[row]].tolist())
        for number, kind in enumerate(kinds, start=1):
            asked[kind] += 1
            right[kind] += number not in wrong_blocks


def shares(right: dict[str, int], asked: dict[str, int]) -> str:
    """Percentages per kind, for the log."""
    return " ".join(f"{kind} {100 * right[kind] / asked[kind]:.0f}" for kind in sorted(asked))


@torch.no_grad()
def validate(model: FastVLM, batches: list[Batch]) -> str:
    """Exact match per kind of question, teacher-forced (equal to greedy decoding: a first wrong token is wrong)."""
    model.eval()
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for batch in batches:
        _, _, cells = model.see(to_pixels(batch.pixels))
        count_exact(answer_logits(model, cells, batch), batch, right, asked)
    model.train()
    return shares(right, asked)


@torch.no_grad()
def refresh_statistics(model: FastVLM, batches: list[Batch]) -> None:
    """Replace the batch norms' running statistics by plain averages over ``batches``."""
    norms = [m for m in model.tower.modules() if isinstance(m, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for batch in batches:
        model.see(to_pixels(batch.pixels))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write and rename, so that a state is never half there."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def parameter_groups(modules: list[nn.Module], decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases, norms, layer scales and the embedding."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            free = parameter.ndim < 2 or "layer_scale" in name or "embed_tokens" in name
            (plain if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(step: int, elapsed: float, args: argparse.Namespace) -> float:
    """The rate at a step and at ``elapsed`` seconds of this run."""
    rate: float = args.lr * min(1.0, (step + 1) / args.warmup_steps)
    if args.decay_minutes > 0:
        left = args.minutes * 60 - elapsed
        rate *= min(1.0, max(left / (args.decay_minutes * 60), 0.003))
    return rate


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of states, log and tokenizer")
    parser.add_argument("--minutes", type=float, default=120.0, help="how long this run trains")
    parser.add_argument("--decay-minutes", type=float, default=20.0, help="of these, at the end, for the rate's fall")
    parser.add_argument("--resume", type=Path, help="a state to start from (default: the run folder's, if any)")
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--questions", type=int, default=5, help="per picture")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--warmup-steps", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.03)
    parser.add_argument("--auxiliary", type=float, default=1.0, help="factor on all auxiliary losses")
    parser.add_argument("--text-share", type=float, default=Options.text_share)
    parser.add_argument(
        "--unnamed-share", type=float, default=0.25, help="of the pictures with shapes: in colours without a name"
    )
    parser.add_argument("--max-characters", type=int, default=Options.max_characters)
    parser.add_argument("--image-size", type=int, default=ModelConfig.image_size)
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute in it: half as long again as fast where the CPU has it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="that train on shared weights, one per core")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--workers", type=int, default=0, help="per process, that draw pictures")
    parser.add_argument("--clip", type=float, default=2.0, help="longest gradient")
    parser.add_argument("--statistics-batches", type=int, default=100, help="for the final batch-norm statistics")
    parser.add_argument("--log-steps", type=int, default=50)
    parser.add_argument("--save-minutes", type=float, default=10.0)
    parser.add_argument("--validate-minutes", type=float, default=5.0)
    parser.add_argument("--validation-pictures", type=int, default=192)
    return parser.parse_args()


@dataclass
class Shared:
    """What all processes of a training share; the tensors of both modules lie in shared memory."""

    args: argparse.Namespace
    model: FastVLM
    auxiliary: Auxiliary
    tokenizer: Tokenizer
    options: Options
    optimizer_state: dict[str, Any] | None
    begin: float  # on the monotonic clock
    stop: Event
    step: Any  # a shared counter
    pictures: Any


class Learner:
    """One process's share of the training: its own pictures and its own optimizer on the shared weights."""

    def __init__(self, shared: Shared, rank: int) -> None:
        """Prepare; ``rank`` 0 is the process that logs and saves."""
        args, config = shared.args, shared.model.config
        self.shared, self.sizes, self.steps = shared, AuxiliarySizes(), 0
        groups = parameter_groups([shared.model, shared.auxiliary], args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
        if shared.optimizer_state is not None:
            self.optimizer.load_state_dict(shared.optimizer_state)
            self.optimizer.param_groups[0]["weight_decay"] = args.weight_decay
        self.warm = shared.optimizer_state is not None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        seed = args.seed + 1000 * (int(shared.step.value) + 1) + rank
        world = World(shared.tokenizer, config, shared.options, args.batch_size, args.questions, seed)
        prefetch = 4 if args.workers else None
        self.batches = iter(DataLoader(world, batch_size=None, num_workers=args.workers, prefetch_factor=prefetch))
        shared.model.train()

    def learn(self, elapsed: float) -> tuple[Batch, Tensor, dict[str, float]]:
        """One step on one batch: the batch, its answers' logits, and the losses."""
        shared = self.shared
        batch = next(self.batches)
        rate = learning_rate(10**9 if self.warm else self.steps, elapsed, shared.args)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=shared.args.bfloat16):
            fine, middle, cells = shared.model.see(to_pixels(batch.pixels))
            outputs = shared.auxiliary(fine, middle, cells)
            logits = answer_logits(shared.model, cells, batch).float()
        losses = auxiliary_losses({key: value.float() for key, value in outputs.items()}, batch.targets, self.sizes)
        asked = batch.labels != IGNORE
        language = F.cross_entropy(without(logits, batch.unlearned[asked]), batch.labels[asked])
        extra = sum((WEIGHTS[key] * value for key, value in losses.items()), torch.zeros(()))
        self.optimizer.zero_grad(set_to_none=True)
        (language + shared.args.auxiliary * extra).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, shared.args.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            LOG.warning("a step was skipped: its gradient is not finite")
        self.steps += 1
        with shared.step.get_lock():
            shared.step.value += 1
            shared.pictures.value += len(batch.kinds)
        values = {"lr": torch.tensor(rate), "norm": norm, "lm": language, **losses}
        return batch, logits.detach(), {key: float(value.detach()) for key, value in values.items()}


def assist(shared: Shared, rank: int) -> None:
    """The loop of every process but the first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(shared.args.threads)
    learner = Learner(shared, rank)
    while (elapsed := time.monotonic() - shared.begin) < shared.args.minutes * 60 and not shared.stop.is_set():
        learner.learn(elapsed)


def train(args: argparse.Namespace) -> None:
    """Run one training, from the start or from a state.

    With ``--processes`` above 1 each process steps on the shared weights whenever it is ready, without waiting for the
    others ("Hogwild", Recht et al. 2011): on a machine that does other work too, threads in lockstep wait for the
    slowest at every layer.
    """
    torch.set_num_threads(args.threads)  # before anything runs: the processes are forked
    vocabulary, merges = bpe.build(corpus())
    bpe.save(args.run / "tokenizer", vocabulary, merges)
    tokenizer = bpe.assemble(vocabulary, merges)

    resume = args.resume or (args.run / STATE if (args.run / STATE).exists() else None)
    state: dict[str, Any] | None = None
    if resume is not None:
        state = compact.read(resume) if resume.suffix == ".safetensors" else torch.load(resume, weights_only=True)
    torch.manual_seed(args.seed)
    config = ModelConfig(image_size=args.image_size, vocab_size=bpe.padded_size(vocabulary))
    if state is not None:
        config = ModelConfig.from_json(state["config"])
    model, auxiliary = FastVLM(config).channels_last(), Auxiliary(config, AuxiliarySizes())
    optimizer_state = None
    context = multiprocessing.get_context("fork")
    counts = context.Value("q", 0), context.Value("q", 0)
    if state is not None:
        model.load_state_dict(state["model"])
        if auxiliary.load_state_dict(state["auxiliary"], strict=False).missing_keys:
            LOG.info("new auxiliary heads: the optimizer starts afresh")
        else:
            optimizer_state = state.get("optimizer")  # a compact state has none
        counts[0].value, counts[1].value = state["step"], state["pictures"]
        LOG.info("resumed from %s at step %d, %d pictures", resume, state["step"], state["pictures"])
    LOG.info("%.2f M parameters, %s", sum(p.numel() for p in model.parameters()) / 1e6, json.dumps(asdict(config)))
    model.share_memory()
    auxiliary.share_memory()

    options = Options(
        config.image_size,
        text_share=args.text_share,
        max_characters=args.max_characters,
        unnamed_share=args.unnamed_share,
    )
    items = fixed_items(replace(options, unnamed_share=0.0), args.validation_pictures, seed=99, held_out=True)
    validation = [make_batch(items[i : i + 32], tokenizer, config) for i in range(0, len(items), 32)]
    shared = Shared(
        args, model, auxiliary, tokenizer, options, optimizer_state, time.monotonic(), context.Event(), *counts
    )
    others = [context.Process(target=assist, args=(shared, rank), daemon=True) for rank in range(1, args.processes)]
    for process in others:
        process.start()
    learner = Learner(shared, 0)

    def snapshot() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "auxiliary": auxiliary.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "step": counts[0].value,
            "pictures": counts[1].value,
            "config": json.dumps(asdict(config)),
        }

    last_log, last_pictures = shared.begin, counts[1].value
    next_save, next_validation = shared.begin + args.save_minutes * 60, shared.begin + args.validate_minutes * 60
    decay_from = args.minutes * 60 - args.decay_minutes * 60
    kept = args.decay_minutes <= 0
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    sums: dict[str, float] = defaultdict(float)
    signal.signal(signal.SIGTERM, lambda *_: shared.stop.set())
    while (elapsed := time.monotonic() - shared.begin) < args.minutes * 60 and not shared.stop.is_set():
        if not kept and elapsed >= decay_from:
            save_state(args.run / BEFORE_DECAY, snapshot())
            LOG.info("the rate falls from here; kept %s", BEFORE_DECAY)
            kept = True
        batch, logits, values = learner.learn(elapsed)
        count_exact(logits, batch, right, asked)
        for key, value in values.items():
            sums[key] += value / args.log_steps
        now = time.monotonic()
        if learner.steps % args.log_steps == 0:
            step, pictures = counts[0].value, counts[1].value
            speed = (pictures - last_pictures) / (now - last_log)
            means = " ".join(f"{key} {value:.3g}" for key, value in sums.items())
            line = f"step {step}, {pictures} pictures, {elapsed / 60:.0f} min, {speed:.1f}/s"
            LOG.info("%s | %s | %s", line, means, shares(right, asked))
            last_log, last_pictures = now, pictures
            for table in (right, asked, sums):
                table.clear()
        if now >= next_validation:
            LOG.info("validation (held out) | %s", validate(model, validation))
            next_validation = now + args.validate_minutes * 60
        if now >= next_save:
            save_state(args.run / STATE, snapshot())
            next_save = now + args.save_minutes * 60
    for process in others:
        process.join(120)
    if shared.stop.is_set():
        save_state(args.run / STATE, snapshot())
        LOG.info("stopped at step %d, %d pictures; the state is saved", counts[0].value, counts[1].value)
        return
    refresh_statistics(model, [next(learner.batches) for _ in range(args.statistics_batches)])
    LOG.info("final validation (held out) | %s", validate(model, validation))
    save_state(args.run / STATE, snapshot())
    LOG.info("done: step %d, %d pictures", counts[0].value, counts[1].value)


def main() -> None:
    """Parse, set up the log, train."""
    args = parse_arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(args.run / "train.log"), logging.StreamHandler()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    LOG.info("options %s", vars(args))
    train(args)


if __name__ == "__main__":
    main()
