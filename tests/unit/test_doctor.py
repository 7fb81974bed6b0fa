"""Each of doctor's checks, on a machine in order as far as it can be, and with a fault put in its way that it has to
find.

What is slow or depends on the machine is stood in for; no time is asserted.
"""

import json
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.backend import blas, ops
from fastvlm_mlx.decoding import generate
from fastvlm_mlx.decoding.image_cache import ImageCache
from fastvlm_mlx.decoding.sampling import choose
from fastvlm_mlx.diagnostics import doctor
from fastvlm_mlx.diagnostics.checks import (
    desk,
    install,
    machine,
    memory,
    operations,
    parity,
    recovery,
    setting,
    speed,
    start,
    threads,
)
from fastvlm_mlx.diagnostics.checks.finding import Finding, at_least, at_most
from fastvlm_mlx.diagnostics.checks.setting import Setting
from fastvlm_mlx.diagnostics.machine import machine as this_machine
from fastvlm_mlx.errors import CheckpointError, ImageError
from fastvlm_mlx.network import memory as estimates
from fastvlm_mlx.network.model import FastVLM
from fastvlm_mlx.network.projector import Projector
from fastvlm_mlx.quantize import rounding

HERE = setting.here(quick=True)
cpu_only = pytest.mark.skipif(HERE.on_gpu, reason="faults are put into the general forms that stand in for a GPU")


def wrong(findings: Iterable[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.status == "wrong"]


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.slow
@cpu_only
def test_both_sides_compute_the_same() -> None:
    """The built-in model, and a random one at two sides in pixels, in every type."""
    findings = list(parity.check(replace(HERE, quick=False)))
    assert wrong(findings) == []
    assert [f.what for f in findings if f.what.endswith(", float16")] == [
        "tiny at 192, float16",
        "random small at 256, float16",
        "random small at 320, float16",
    ]
    assert all(
        set(f.details) >= {"pixels", "stem", "stage 4", "prefill", "steps"} for f in findings if f.what.endswith("16")
    )


def other_depthwise(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[mx.array], mx.array], dtype: mx.Dtype = mx.float32
) -> None:
    """The tower's depthwise convolution at 64 channels (stage 1) on the side examined, spoilt."""
    right = ops.depthwise

    def form(x: mx.array, weight: mx.array, stride: int) -> mx.array:
        y = right(x, weight, stride)
        spoilt: mx.array = spoil(y) if ops.current() == "metal" and y.shape[-1] == 64 and y.dtype == dtype else y
        return spoilt

    monkeypatch.setattr("fastvlm_mlx.network.vision.depthwise", form)


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("spoil", [lambda y: y * 1.001, lambda y: mx.roll(y, 1, 1), lambda y: y * float("nan")])
def test_a_stage_that_is_off_is_named(spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other_depthwise(monkeypatch, spoil)
    finding = next(f for f in parity.check(HERE) if f.what == "tiny at 192, float32")
    assert finding.status == "wrong" and "first in stage 1" in finding.found
    json.dumps(finding.to_dict(), allow_nan=False)


@pytest.mark.slow
@cpu_only
def test_a_stage_that_is_off_in_16_bits_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other_depthwise(monkeypatch, lambda y: mx.roll(y, 1, 1), mx.bfloat16)
    findings = list(parity.check(HERE))
    assert wrong(findings) == ["tiny at 192, bfloat16"]
    assert "first in stage 1" in next(f.found for f in findings if f.status == "wrong")


@pytest.mark.slow
@cpu_only
def test_a_step_that_does_not_see_the_picture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.causal_attention

    def form(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> mx.array:
        if ops.current() == "metal" and q.shape[2] == 1:
            k, v = k[:, :, 24:], v[:, :, 24:]
        return right(q, k, v, mask)

    monkeypatch.setattr("fastvlm_mlx.network.language.causal_attention", form)
    findings = list(parity.check(HERE))
    assert {"tiny at 192, float32", "tiny at 192, float32: tokens", "tiny's answers"} <= set(wrong(findings))
    assert "first in steps" in findings[0].found


def test_another_token_is_right_only_where_logits_are_nearly_equal() -> None:
    logits = np.array([[1.0, 0.99995, 0.5]], np.float32)
    steps = np.repeat(logits, parity.GREEDY_TOKENS - 1, axis=0)
    one = parity.Passage({"prefill": logits, "steps": steps}, [0] * parity.GREEDY_TOKENS)
    for token, status in ((0, "right"), (1, "right"), (2, "wrong")):
        other = parity.Passage(one.stages, [token, *[0] * (parity.GREEDY_TOKENS - 1)])
        assert parity.same_tokens("", other, one).status == status


def test_distance_and_cosine_of_what_is_no_number() -> None:
    right, nan = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert parity.distance(nan, right) == float("inf") and parity.cosine(nan, right) == -1
    assert parity.distance(np.ones(2, np.float32), right) == float("inf")
    assert at_most("", float("nan"), 1, found="", expected="").status == "wrong"
    assert at_least("", float("nan"), 1, found="", expected="").status == "wrong"


# ---- operations ----------------------------------------------------------------------------------


@pytest.mark.slow
@cpu_only
def test_operations_agree() -> None:
    assert wrong(operations.check(replace(HERE, quick=False))) == []


def swapped(right: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A form that turns its result's channels round on the side examined."""

    def form(*arguments: Any) -> mx.array:
        y = right(*arguments)
        return y[..., ::-1] if ops.current() == "metal" else y

    return form


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("depthwise", "depthwise"),
        ("attention of the tower", "attention"),
        ("attention of the decoder", "causal_attention"),
        ("product", "linear"),
        ("quantised product", "quantized_linear"),
        ("activations", "gelu"),
        ("activations", "swiglu"),
    ],
)
def test_an_operation_that_is_off_is_found(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, name, swapped(getattr(ops, name)))
    found = operations.compare(HERE, family, operations.families(True, False)[family], "float32")
    assert found.status == "wrong" and "Error" not in found.found
    if name != "swiglu":
        assert (
            operations.compare(HERE, family, operations.families(True, False)[family][:1], "bfloat16").status == "wrong"
        )


@pytest.mark.slow
@cpu_only
def test_an_operation_that_raises_is_found_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.attention

    def form(qkv: mx.array) -> mx.array:
        if ops.current() == "metal":
            raise ValueError("no such kernel")
        return right(qkv)

    monkeypatch.setattr(ops, "attention", form)
    findings = list(operations.check(HERE))
    assert [f.found for f in findings if f.status == "wrong"] == ["ValueError: no such kernel at 1 keys of 32"]
    assert findings[-1].what == "packing"


def test_rotary_positions_that_are_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operations.rope().status == "right"
    right = mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda x, dims, **how: right(x, dims, **{**how, "traditional": True}))
    assert operations.rope().status == "wrong"
    monkeypatch.setattr(mx.fast, "rope", lambda x, dims, **how: right(x, dims, **{**how, "offset": 0}))
    assert operations.rope().status == "wrong"


def test_a_nucleus_that_is_too_wide_or_drawn_unevenly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choose
    assert operations.top_p(2048).status == "right"
    monkeypatch.setattr(
        operations, "choose", lambda logits, temperature, top_p, key: right(logits, temperature, 1.0, key)
    )
    assert operations.top_p(2048).status == "wrong"
    monkeypatch.setattr(operations, "choose", lambda logits, temperature, top_p, key: right(logits, 0.3, top_p, key))
    assert operations.top_p(2048).status == "wrong"


def test_bits_in_the_wrong_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operations.packing(quick=False).status == "right"
    right = rounding.pack
    monkeypatch.setattr(rounding, "pack", lambda q, bits: right(q[:, ::-1], bits))
    assert operations.packing(quick=True).status == "wrong"


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_thread_has_not_computed_yet_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings are cached before they are evaluated, so that only the thread that made them could."""
    right = ImageCache.put
    monkeypatch.setattr(ImageCache, "put", lambda self, key, embeddings: right(self, key, embeddings + 0))
    assert "cached by one thread, used by another" in wrong(threads.check(HERE))


@pytest.mark.slow
def test_a_stream_that_belongs_to_a_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate.stream

    def bound(*arguments: Any) -> Iterator[Any]:
        reader = None
        for chunk in right(*arguments):
            if reader not in (None, threading.get_ident()):
                raise RuntimeError("There is no Stream in current thread")
            reader = threading.get_ident()
            yield chunk

    monkeypatch.setattr(threads, "in_thread", lambda work, start=threads.in_thread: kept_alive(start, work))
    monkeypatch.setattr(threads, "stream", bound)
    assert "a stream read by a new thread for each chunk" in wrong(threads.check(HERE))


def kept_alive(start: Any, work: Any) -> Any:
    """Work in a thread that lasts a moment longer, so that the next one has another identity."""
    done = threading.Event()
    answer = start(lambda: (work(), done.wait(0.05))[0])
    return answer


@pytest.mark.slow
def test_a_thread_that_takes_the_model_along_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate.stream
    left: list[bool] = []

    def stream(*arguments: Any) -> Iterator[Any]:
        if left:
            raise CheckpointError("busy")
        finished = False
        try:
            yield from right(*arguments)
            finished = True
        finally:
            if not finished:
                left.append(True)

    monkeypatch.setattr(threads, "stream", stream)
    assert "a thread that ends in the middle of an answer" in wrong(threads.check(HERE))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_held_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, held = FastVLM.encode, list[mx.array]()

    def encode(self: FastVLM, pixels: mx.array) -> mx.array:
        held.append(mx.ones((2_500_000,)) + 0)  # 10 MB for as long as the answer takes
        mx.eval(held[-1])
        return right(self, pixels)

    monkeypatch.setattr(FastVLM, "encode", encode)
    engine = HERE.subject.engine("small").at(memory.IMAGE_SIDE)
    assert memory.pictures_together(engine, HERE).status == "wrong"


@pytest.mark.slow
def test_what_questions_leave_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HERE.local.engine()
    assert memory.left_behind(engine).status == "right"
    right, kept = generate.stream, list[mx.array]()

    def stream(*arguments: Any) -> Iterator[Any]:
        kept.append(mx.ones((2500,)) + 0)  # 10 kB of each question
        mx.eval(kept[-1])
        yield from right(*arguments)

    monkeypatch.setattr(memory, "stream", stream)
    assert memory.left_behind(engine).status == "wrong"


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("share", [0.5, 2])
def test_an_estimate_that_is_off_is_found(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HERE.local.engine()
    assert memory.estimated(engine, HERE).status == "right"
    right = estimates.estimate

    def estimate(*arguments: Any, **how: Any) -> Any:
        found = right(*arguments, **how)
        return replace(found, activations=round(found.total * share - found.total + found.activations))

    monkeypatch.setattr(estimates, "estimate", estimate)
    assert memory.estimated(engine, HERE).status == "wrong"


# ---- recovery ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_error_that_says_nothing_of_memory_is_found() -> None:
    def fails() -> mx.array:
        raise ZeroDivisionError("division by zero")

    outcome = recovery.overload(HERE.subject.engine(), recovery.ENCODER, fails)
    first = next(recovery.findings([outcome]))
    assert first.status == "wrong" and "ZeroDivisionError" in first.found
    silent = recovery.overload(HERE.subject.engine(), recovery.ENCODER, lambda: mx.zeros(()))
    assert "nothing was raised" in next(recovery.findings([silent])).found


@pytest.mark.slow
def test_a_sentence_about_memory_is_right_and_the_next_answer_too() -> None:
    def fails() -> mx.array:
        raise CheckpointError("There is not enough memory; use a smaller model.")

    outcome = recovery.overload(HERE.subject.engine(), recovery.ENCODER, fails)
    assert wrong(recovery.findings([outcome])) == []


def test_what_a_failed_answer_leaves_behind_is_found() -> None:
    class Keeping(ImageCache):
        def clear(self) -> None:
            pass

    engine = HERE.subject.engine()
    engine.images = Keeping()
    outcome = recovery.overload(engine, recovery.ENCODER, recovery.as_metal_does)
    assert outcome.pictures == 1 and "what the failed answer left behind" in wrong(recovery.findings([outcome]))
    assert "what the failed answer left behind" in wrong(
        recovery.findings([replace(outcome, pictures=0, positions=43)])
    )


@pytest.mark.slow
def test_a_wrong_answer_after_an_error_is_found() -> None:
    engine = HERE.subject.engine()

    def fails() -> mx.array:
        head = engine.model.text.norm
        head.weight = -head.weight  # as if the buffers were another's
        raise RuntimeError(recovery.STAND_IN)

    outcome = recovery.overload(engine, recovery.ENCODER, fails)
    assert "the next answer" in wrong(recovery.findings([outcome]))


@pytest.mark.slow
def test_a_process_of_its_own_tells_what_came_of_it() -> None:
    outcomes = recovery.in_a_process()
    assert [outcome.part for outcome in outcomes] == list(recovery.PARTS)
    assert all(outcome.after == outcome.alone != "" for outcome in outcomes)


def test_a_process_that_does_not_come_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "CODE", "import os; os._exit(139)")
    monkeypatch.setattr(Setting, "on_gpu", True)
    (found,) = doctor.examined("recovery", recovery.check, HERE)
    assert found.status == "wrong" and "139" in found.found


# ---- speed and start -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_that_is_slow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Projector.__call__

    def slow(self: Projector, features: mx.array) -> mx.array:
        time.sleep(0.1)  # hundreds of times what it takes
        return right(self, features)

    monkeypatch.setattr(Projector, "__call__", slow)
    findings = list(speed.check(replace(HERE, quick=False)))
    assert any("projector" in what for what in wrong(findings))
    assert [f.unit for f in findings[:2]] == ["GB/s", "TFLOPS"]
    assert len([f for f in findings if f.unit == "of the bound"]) == 10


def test_a_stage_is_held_against_what_bounds_it() -> None:
    work = speed.Work(operations=8e9, nbytes=1e9)
    by_products = speed.share("", 0.1, work, per_second=1e11, bytes_per_second=1e11)
    assert by_products.value == pytest.approx(0.8) and "products" in by_products.found
    by_bytes = speed.share("", 0.1, work, per_second=1e12, bytes_per_second=2e10)
    assert by_bytes.value == pytest.approx(0.5) and "bytes" in by_bytes.found
    assert speed.share("", 10, work, 1e11, 1e11).status == "wrong"


def test_a_quick_run_measures_the_machine_alone() -> None:
    assert [f.status for f in speed.check(HERE)] == ["measured"] * 2


def test_processes_that_answer_differently_or_fail_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["One.", "Two."])
    told = {"load_seconds": 0.1, "ttft_seconds": 0.1}
    monkeypatch.setattr(start, "python", lambda _: json.dumps({"text": next(answers), **told}))
    assert wrong(start.check(HERE)) == ["answers of both processes"]
    monkeypatch.setattr(start, "python", lambda _: json.dumps({"text": "", **told}))
    assert wrong(start.check(HERE)) == ["answers of both processes"]
    monkeypatch.undo()
    monkeypatch.setenv("FASTVLM_CACHE", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (found,) = doctor.examined("start", start.check, HERE)
    assert found.status == "wrong" and "ended with 1" in found.found


# ---- desk, install, machine ----------------------------------------------------------------------


@pytest.mark.parametrize(("system", "status"), [("darwin", "wrong"), ("linux", "note")])
def test_no_way_to_heic_is_found(system: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "made_heic", lambda: None)
    monkeypatch.setattr(sys, "platform", system)
    assert desk.heic().status == status


def test_a_heic_picture_that_is_refused_or_of_another_colour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(desk, "made_heic", lambda: b"\0\0\0\x18ftypheic")
    refused = desk.heic()
    assert refused.status == "wrong"
    monkeypatch.setattr(desk, "load_image", lambda _: Image.new("RGB", (64, 64), desk.COLOUR))
    assert desk.heic().status == "right"
    monkeypatch.setattr(desk, "load_image", lambda _: Image.new("RGB", (64, 64), desk.COLOUR[::-1]))
    assert desk.heic().status == "wrong"

    def fails(_: object) -> None:
        raise ImageError("no")

    monkeypatch.setattr(desk, "load_image", fails)
    assert desk.heic().found == "no"


def test_a_clipboard_nobody_can_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert desk.clipboard().status == "note"
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    assert desk.clipboard().status == "right"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(desk, "OSASCRIPT", "/bin/false")
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert desk.clipboard().status == "wrong"
    monkeypatch.setenv("SSH_CONNECTION", "1")  # from afar there may be no desktop
    assert desk.clipboard().status == "note"


def test_a_terminal_that_loses_characters_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Latin:
        encoding = "ISO-8859-1"

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Latin())
    assert desk.terminal().status == "note"


def test_a_wheel_without_the_chips_kernels_is_found() -> None:
    old, new = ["mlx-metal py3-none-macosx_15_0_arm64"], ["mlx-metal py3-none-macosx_26_0_arm64"]
    assert install.wheel(system="26.2", name="Apple M5 Pro", tags=old).status == "wrong"
    assert install.wheel(system="26.2", name="Apple M5 Pro", tags=[]).status == "wrong"
    assert install.wheel(system="26.2", name="Apple M5 Pro", tags=new).status == "right"
    assert install.wheel(system="26.1", name="Apple M5", tags=old).status == "right"
    assert install.wheel(system="26.2", name="Apple M4", tags=old).status == "right"
    assert install.wheel().status == "right"


def test_an_old_mlx_settings_and_a_slow_blas_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [install.mlx_version(number).status for number in ("0.31.1", "0.32.2", "0.32.3", "0.33.0", "1.0")] == [
        "wrong", "wrong", "right", "right", "right",
    ]  # fmt: skip
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "2")
    monkeypatch.setattr(blas, "is_slow", lambda: True)
    notes = [f.what for f in install.check(HERE) if f.status == "note"]
    assert notes == ["MLX's settings in the environment", "matrix products on the CPU"]


def test_a_mac_that_is_not_in_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its tools would print."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6", ("", "", ""), "arm64"))
    said = {
        "sysctl.proc_translated": "1",
        "vm.swapusage": "total = 40960.00M  used = 40000.25M  free = 1.00M",
        "kern.hv_vmm_present": "1",
    }
    tools: dict[str, Callable[..., str]] = {"/usr/sbin/sysctl": lambda _, name: said.get(name, ""),
        "/usr/sbin/ioreg": lambda *_: '"gpu-core-count" = 10',
             "/usr/bin/pmset": lambda _: " lowpowermode         1"}  # fmt: skip
    monkeypatch.setattr(machine, "output", lambda tool, *arguments: tools[tool](*arguments))
    findings = {f.what: f for f in machine.check(replace(HERE))}
    assert {"macOS", "Rosetta", "Metal"} <= set(wrong(findings.values())) or HERE.on_gpu
    assert findings["GPU cores"].found == "10"
    assert {f.what for f in findings.values() if f.status == "note"} >= {
        "low power mode",
        "swap in use",
        "virtual machine",
    }


# ---- the run and its report ----------------------------------------------------------------------


def report(*findings: Finding) -> doctor.Report:
    return doctor.Report(findings, this_machine(), quick=True, seconds=1.2)


def test_what_a_check_raises_is_a_finding_and_the_next_has_its_turn() -> None:
    def fails(_: Setting) -> Iterator[Finding]:
        yield Finding("one", "right", "so")
        raise RuntimeError("[METAL] Command buffer execution failed")

    def works(_: Setting) -> Iterator[Finding]:
        yield Finding("two", "right", "so")

    said: list[str] = []
    found = doctor.examine(quick=True, progress=said.append, checks={"first": fails, "second": works})
    assert [(f.check, f.what, f.status) for f in found.findings] == [
        ("first", "one", "right"), ("first", "first to its end", "wrong"), ("second", "two", "right"),
    ]  # fmt: skip
    assert "RuntimeError: [METAL]" in found.verdict and not found.right
    assert said == ["first", "second"]


def test_tf32_is_off_while_it_runs_and_the_environment_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    seen: list[str | None] = []

    def looks(_: Setting) -> Iterator[Finding]:
        seen.append(os.environ.get(doctor.EXACT))
        yield from ()

    for before in (None, "1"):
        monkeypatch.delenv(doctor.EXACT, raising=False)
        if before:
            monkeypatch.setenv(doctor.EXACT, before)
        doctor.examine(checks={"one": looks})
        assert os.environ.get(doctor.EXACT) == before
    assert seen == ["0", "0"]


def test_verdicts_and_the_table() -> None:
    right, note = Finding("a", "right", "1", "2", check="x"), Finding("b", "note", "3", check="x")
    assert report(right).verdict == f"Nothing is wrong: 1 check right (1 s, quick, {HERE.local.backend})."
    assert report(right, right, note).verdict.startswith("Nothing is wrong: 2 checks right, 1 note to read (")
    bad = report(right, Finding("c\x1b[2J", "wrong", "4\n5" + "6" * 1000, "7", check="y"))
    assert bad.verdict.startswith("Something is wrong: 1 of 2 checks failed; first y, c") and len(bad.verdict) < 500
    assert "\n" not in bad.verdict
    lines = report(right, note).table().splitlines()
    assert lines[1].split() == ["right", "x", "a", "1", "2"] and lines[2].split() == ["note", "x", "b", "3"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("'/Users/ann smith/My Pictures/x.jpg' is damaged", "'<path>' is damaged"),
        ("see ~/.cache/models and /tmp/x: 24.9 GB/s, 1/45", "see <path> and <path> 24.9 GB/s, 1/45"),
        ("C:\\Users\\ann\\x.png", "<path>"),
        ("file:///Users/x/a.png", "file:<path>"),
        ("ann's Mac, annual, ann-mac", "<name>'s Mac, annual, <name>"),
        ("at most 4e-6 (B, H/2), and/or", "at most 4e-6 (B, H/2), and/or"),
    ],
)
def test_paths_and_names_are_left_out_for_programs(text: str, told: str) -> None:
    assert doctor.private({"found": [text], "value": 1.0}, ["ann-mac", "ann"]) == {"found": [told], "value": 1.0}


def test_fixed_words_stay_whatever_the_user_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "own_names", lambda: ["right", "parity"])
    (found,) = report(Finding("a", "right", "right", check="parity")).to_dict()["findings"]
    assert (found["status"], found["check"], found["found"]) == ("right", "parity", "<name>")
