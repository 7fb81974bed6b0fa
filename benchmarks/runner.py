"""One runtime in a process of its own, doing what it is told: reads commands, answers with figures, one JSON line each.

    PYTHON -m benchmarks.runner RUNTIME FOLDER       (started by `benchmarks.compare`; RUNTIME: ours, mlx-vlm or
    transformers)

Commands on stdin: `load`, `run` (answer once, stage by stage), `folder` (many pictures together), `features` (to a .npy
file), `photo` (preprocess a file), `quit`. Imports nothing of fastvlm_mlx unless the runtime is ours: each process
holds what its users' would. Stages are taken in one and the same answer: preprocess until the tensors are there, vision
until the image embeddings are, prefill until the first token has been read, and decode from there on.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

Figures = dict[str, float]
clock = time.perf_counter


class Ours:
    """fastvlm-mlx through the calls its command line makes."""

    def __init__(self, folder: Path):
        import fastvlm_mlx

        self.vlm = fastvlm_mlx.load(str(folder))
        self.versions = {"fastvlm-mlx": fastvlm_mlx.__version__, **_versions("mlx", "numpy", "pillow")}

    def run(self, image: str, prompt: str, tokens: int) -> Figures:
        """Answer once."""
        from fastvlm_mlx.decoding.generate import stream
        from fastvlm_mlx.decoding.request import Options

        engine = self.vlm.engine
        self.vlm.images.clear()  # a picture seen before would not be encoded again
        options = Options(tokens, stop_tokens=())  # nothing ends an answer early
        *_, last = stream(engine, engine.prepare(image, prompt), options)
        assert last.answer is not None, "the last chunk carries the answer"
        stats = last.answer.stats
        return _figures(
            stats.prompt_tokens,
            stats.preprocess_seconds,
            stats.vision_seconds,
            stats.ttft_seconds,
            stats.decode_tokens_per_second,
        )

    def folder(self, images: list[str], prompt: str, tokens: int, together: int) -> int:
        """Answer a question about many pictures, as `fastvlm-mlx batch` does; returns the tokens generated."""
        from fastvlm_mlx import Answer
        from fastvlm_mlx.decoding.mapping import map_rows
        from fastvlm_mlx.decoding.request import Options

        self.vlm.images.clear()
        answers = map_rows(self.vlm.engine, images, prompt, Options(tokens, stop_tokens=()))
        return sum(len(answer.token_ids) for answer in answers if isinstance(answer, Answer))

    def features(self, image: str) -> np.ndarray:
        """Image embeddings (N, D)."""
        import mlx.core as mx

        embeddings = self.vlm.encode_image(image)
        assert isinstance(embeddings, mx.array)
        return np.array(embeddings.astype(mx.float32))

    def photo(self, image: str) -> object:
        """The tensor of a picture, whatever its size."""
        from fastvlm_mlx.inputs.image import load_image, preprocess

        return preprocess(load_image(image), self.vlm.config.image)


class MLXVLM:
    """mlx-vlm through `stream_generate`, which its command line and server use."""

    def __init__(self, folder: Path):
        import mlx.core as mx
        from mlx_vlm import load
        from mlx_vlm.generate import dispatch

        self.mx, self.dispatch = mx, dispatch
        self.model, self.processor = load(str(folder))
        self.processor.tokenizer.stopping_criteria = _NeverEnding()
        self.versions = _versions("mlx-vlm", "mlx", "mlx-lm", "transformers", "numpy")
        self.marks: dict[str, float] = {}
        self._note("preprocess", dispatch, "_prepare_generation_inputs", lambda out: out[1])
        self._note("vision", self.model, "get_input_embeddings", lambda out: out.inputs_embeds)

    def _note(self, stage: str, owner: Any, name: str, result: Callable[[Any], Any]) -> None:
        """Wait for what a function gives and note when it was there."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            out = original(*arguments, **options)
            self.mx.eval(result(out))
            self.marks[stage] = clock()
            return out

        object.__setattr__(owner, name, call)  # past mlx.nn.Module, which would take it for a weight

    def run(self, image: str, prompt: str, tokens: int) -> Figures:
        """Answer once."""
        started, times, count = clock(), [], 0
        for part in self.dispatch.stream_generate(
            self.model, self.processor, _text(prompt), image=[image], max_tokens=tokens, temperature=0.0
        ):
            times.append(clock())
            count = part.prompt_tokens
        first, last = times[0], times[tokens - 1]
        grid = self.processor.image_processor.size["shortest_edge"] // 64
        preprocess = self.marks["preprocess"] - started
        vision = self.marks["vision"] - self.marks["preprocess"]
        return _figures(count - 1 + grid * grid, preprocess, vision, first - started, (tokens - 1) / (last - first))

    def folder(self, images: list[str], prompt: str, tokens: int, together: int) -> int:
        """Answer a question about many pictures by `batch_generate`, so many at a time; returns the tokens."""
        from mlx_vlm.generate.ar import batch_generate

        count = 0
        for start in range(0, len(images), together):
            part = images[start : start + together]
            found = batch_generate(
                self.model, self.processor, images=part, prompts=[prompt] * len(part), max_tokens=tokens
            )
            count += found.stats.generation_tokens
        return count

    def features(self, image: str) -> np.ndarray:
        """Image embeddings (N, D)."""
        mx = self.mx
        inputs = self.dispatch._prepare_generation_inputs(
            self.model, self.processor, _text(""), [image], None, None, {}
        )
        _, features, _ = self.model.vision_tower(mx.array(inputs[1]).transpose(0, 2, 3, 1))
        features = self.model.mm_projector(features.reshape(1, -1, features.shape[-1]))
        return np.array(features[0].astype(mx.float32))

    def photo(self, image: str) -> object:
        """The tensor of a picture, whatever its size."""
        inputs = self.dispatch._prepare_generation_inputs(
            self.model, self.processor, _text(""), [image], None, None, {}
        )
        self.mx.eval(inputs[1])
        return inputs[1]


class _NeverEnding:
    """In the place of mlx-vlm's criteria: no token ends an answer."""

    eos_token_ids: tuple[int, ...] = ()

    def __call__(self, token: object) -> bool:
        return False

    def add_eos_token_ids(self, ids: object = None) -> None:
        """Take no more either."""

    def reset(self, ids: object = None) -> None:
        """Stay as it is."""


class Transformers:
    """transformers' FastVLM on PyTorch, on the CPU or CUDA: its image processor, `generate` with a streamer."""

    def __init__(self, folder: Path):
        import torch

        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # PyPI's torchvision beside a CPU build of torch: two operators have to be declared first
            operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from transformers import AutoTokenizer, CLIPImageProcessor, FastVlmForConditionalGeneration

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        from_pretrained: Any = FastVlmForConditionalGeneration.from_pretrained
        self.model = from_pretrained(folder, dtype="auto").to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.model.generation_config.eos_token_id = None
        self.versions = _versions("transformers", "torch", "timm", "numpy")
        self.seen = 0.0
        original = self.model.model.get_image_features

        @functools.wraps(original)  # generate() looks at its parameters
        def get_image_features(*arguments: Any, **options: Any) -> Any:
            out = original(*arguments, **options)
            self._wait()
            self.seen = clock()
            return out

        self.model.model.get_image_features = get_image_features

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _pixels(self, image: str) -> Any:
        from PIL import Image

        with Image.open(image) as picture:
            return self.processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"].to(self.device)

    def run(self, image: str, prompt: str, tokens: int) -> Figures:
        """Answer once."""
        torch, times = self.torch, []

        class Clock:
            def put(self, value: Any) -> None:
                times.append(clock())

            def end(self) -> None:
                pass

        started = clock()
        pixels = self._pixels(image)
        image_tokens = self.model.config.image_seq_length
        before, after = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in _text(prompt).split("<image>")
        )
        ids = torch.tensor([[*before, *[self.model.config.image_token_id] * image_tokens, *after]]).to(self.device)
        ready = clock()
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels.to(self.model.dtype),
                max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, streamer=Clock(), pad_token_id=0,
            )  # fmt: skip
        first, last = times[1], times[-1]  # the prompt itself is put first
        return _figures(
            ids.shape[1], ready - started, self.seen - ready, first - started, (tokens - 1) / (last - first)
        )

    def folder(self, images: list[str], prompt: str, tokens: int, together: int) -> int:
        """Answer a question about many pictures by `generate`, so many at a time; returns the tokens."""
        torch, count = self.torch, 0
        before, after = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in _text(prompt).split("<image>")
        )
        row = [*before, *[self.model.config.image_token_id] * self.model.config.image_seq_length, *after]
        for start in range(0, len(images), together):
            pixels = torch.cat([self._pixels(image) for image in images[start : start + together]])
            ids = torch.tensor([row] * len(pixels)).to(self.device)
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels.to(self.model.dtype),
                    max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            count += out[:, ids.shape[1] :].numel()
        return count

    def features(self, image: str) -> np.ndarray:
        """Image embeddings (N, D)."""
        with self.torch.inference_mode():
            out = self.model.model.get_image_features(
                pixel_values=self._pixels(image).to(self.model.dtype), return_dict=True
            )
        return np.array(out.pooler_output[0].float().cpu())

    def photo(self, image: str) -> object:
        """The tensor of a picture, whatever its size."""
        return self._pixels(image)


class ChannelsLast(Transformers):
    """transformers with its tower in torch's other memory layout, the faster one on some machines."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model.model.vision_tower.to(memory_format=self.torch.channels_last)

    def _pixels(self, image: str) -> Any:
        return super()._pixels(image).contiguous(memory_format=self.torch.channels_last)


RUNTIMES: dict[str, type[Ours] | type[MLXVLM] | type[Transformers]] = {
    "ours": Ours,
    "mlx-vlm": MLXVLM,
    "transformers": Transformers,
    "transformers, channels_last": ChannelsLast,
}


def _text(prompt: str) -> str:
    """The prompt as Apple's template "qwen_2" puts it; the same string for all three."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
        f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def _figures(tokens: int, preprocess: float, vision: float, first: float, rate: float) -> Figures:
    return {
        "prompt_tokens": tokens,
        "preprocess_seconds": preprocess,
        "vision_seconds": vision,
        "prefill_seconds": first - preprocess - vision,
        "ttft_seconds": first,
        "decode_tokens_per_second": rate,
    }


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def memory(reset: bool = False) -> tuple[int, int]:
    """(most, now) of the process's memory in bytes, after setting the former to the latter if asked; zeros off
    Linux."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return sizes["VmHWM"], sizes["VmRSS"]


def answer(runtime: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Do one command."""
    kind = command["command"]
    if kind == "run":
        spent = time.process_time()
        figures = runtime.run(command["image"], command["prompt"], command["tokens"])
        return {**figures, "processor_seconds": time.process_time() - spent, "peak_memory_bytes": memory()[0]}
    if kind == "folder":
        memory(reset=True)
        started = clock()
        count = runtime.folder(command["images"], command["prompt"], command["tokens"], command["together"])
        return {"seconds": clock() - started, "tokens": count, "peak_memory_bytes": memory()[0]}
    if kind == "features":
        np.save(command["out"], runtime.features(command["image"]))
        return {}
    if kind == "photo":
        runtime.photo(command["image"])  # once unmeasured: libraries are loaded on first use
        before = memory(reset=True)[1]
        started = clock()
        kept = runtime.photo(command["image"])
        seconds = clock() - started
        del kept
        return {"photo_seconds": seconds, "photo_memory_bytes": memory()[0] - before}
    raise ValueError(kind)


def main() -> None:
    """Load, then serve."""
    started = float(os.environ.get("STARTED", time.time()))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    name, folder = sys.argv[1], Path(sys.argv[2])
    runtime = RUNTIMES[name](folder)
    ready = time.time() - started  # from the start of the process: imports and weights
    greeting = {"start_seconds": ready, "versions": runtime.versions}
    if name == "ours":
        from fastvlm_mlx.diagnostics.machine import machine

        greeting["machine"] = asdict(machine())
    print(json.dumps(greeting), file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "quit":
            return
        print(json.dumps(answer(runtime, command)), file=replies, flush=True)


if __name__ == "__main__":
    main()
