"""This machine: what computes on it, its memory and a process's, and what downloads have left on it."""

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..backend import blas, cpu, ops
from ..backend.cpu import cores
from ..hub import caches
from ..version import __version__

MEASURED = ("mlx", "numpy", "pillow", "tokenizers")  # libraries that measured figures depend on
LIBRARIES = (*MEASURED, "huggingface_hub")
Lines = list[tuple[str, str]]  # rows of a table: name and value


@dataclass(frozen=True)
class Machine:
    """The machine that figures were taken on, and the versions of what computed them."""

    date: str
    system: str
    cpu: str
    cores: int
    memory_bytes: int
    backend: str
    device: str
    blas: str
    python: str
    libraries: dict[str, str]

    def describe(self) -> str:
        """The machine as two lines of text."""
        libraries = ", ".join(f"{name} {number}" for name, number in self.libraries.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB, {self.system}; "
            f"{self.backend} ({self.device}), BLAS: {self.blas}\n{libraries}, Python {self.python}; {self.date}"
        )


def machine() -> Machine:
    """This machine, and what computes on it."""
    device = mx.device_info()
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=cores.count(),
        memory_bytes=cpu.memory_bytes(),
        backend=ops.current(),
        device=str(device.get("device_name", device.get("architecture", "unknown"))),
        blas=_blas_name(),
        python=platform.python_version(),
        libraries={"fastvlm-mlx": __version__, **{name: version(name) for name in MEASURED}},
    )


def _cpu_name() -> str:
    """The processor's name as the system gives it, without trademark signs."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return " ".join(name.replace("(R)", "").replace("(TM)", "").split())


def _blas_name() -> str:
    """The BLAS in use; for OpenBLAS with its version and number of threads."""
    status = blas.status()
    if status != "OpenBLAS":
        return status
    import ctypes

    library = ctypes.CDLL(None)  # the symbols of every library already in the process
    try:
        describe, threads = library.openblas_get_config, library.openblas_get_num_threads
    except AttributeError:
        return status
    describe.restype = ctypes.c_char_p
    name = (describe() or b"OpenBLAS").decode(errors="replace").split()
    return f"{' '.join(name[:2])}, {threads()} threads"


def reset_peak_memory() -> None:
    """Reset the process's peak memory, where the system allows it (Linux); elsewhere it counts from the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The process's peak memory in bytes: since `reset_peak_memory` on Linux, since its start elsewhere."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def usable_memory() -> int:
    """Bytes that a model can take on this machine.

    On a GPU that is what the system recommends, elsewhere the machine's memory or what the process is allowed of it.
    """
    device = mx.device_info()
    if ops.current() != "cpu":
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if key in device:
                return int(device[key])
    total = cpu.memory_bytes()
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(allowed)) if allowed.isdigit() else total


@dataclass(frozen=True)
class MachineInfo:
    """This machine, the versions in use, and what is kept on its disk."""

    libraries: dict[str, str]
    machine: str
    memory_bytes: int
    usable: int
    backend: str
    device: str
    blas: str
    caches: list[caches.Cache]

    def lines(self) -> Lines:
        """The machine as (name, text) rows of a table."""
        sizes = f"{in_bytes(self.memory_bytes)} of memory, a model can take up to {in_bytes(self.usable)}"
        lines = [
            ("machine", f"{self.machine}, {sizes}"),
            ("backend", f"{self.backend} ({self.device})"),
            ("BLAS", self.blas),
        ]
        lines += self.libraries.items()
        for cache in self.caches:
            partial = f", {in_bytes(cache.partial)} of it interrupted downloads" if cache.partial else ""
            lines.append(("cache", f"{cache.name}: {in_bytes(cache.nbytes)}{partial}; to clear it: {cache.clear}"))
        return lines if self.caches else [*lines, ("cache", "nothing is kept")]

    def to_dict(self) -> dict[str, Any]:
        """The machine as a JSON object; sizes are in bytes."""
        kept = [
            {"name": c.name, "path": str(c.path), "bytes": c.nbytes, "partial_bytes": c.partial, "clear": c.clear}
            for c in self.caches
        ]
        return {
            "libraries": self.libraries, "machine": self.machine, "memory_bytes": self.memory_bytes,
            "usable_memory_bytes": self.usable, "backend": self.backend, "device": self.device, "blas": self.blas,
            "caches": kept,
        }  # fmt: skip


def machine_info() -> MachineInfo:
    """This machine, with what is kept on its disk."""
    device = mx.device_info()
    return MachineInfo(
        libraries={
            "fastvlm-mlx": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        machine=f"{platform.system()} {platform.machine()}",
        memory_bytes=cpu.memory_bytes(),
        usable=usable_memory(),
        backend=ops.current(),
        device=str(device.get("device_name", device.get("architecture", "unknown"))),
        blas=blas.status(),
        caches=list(caches.every()),
    )


def in_bytes(nbytes: int) -> str:
    """A number of bytes with about three digits: "8.1 MB", "1.24 GB"."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e8 else f"{nbytes / 1e9:.2f} GB"
