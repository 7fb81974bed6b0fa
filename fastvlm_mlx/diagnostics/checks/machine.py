"""The machine: chip, system, memory, and what may slow it down or change what is measured on it."""

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from ...backend import cpu
from ..machine import in_bytes, machine, usable_memory
from .finding import Finding, holds
from .setting import Setting

FIRST_SYSTEM = (14, 0)  # the oldest macOS that MLX's wheels support
TOOL_SECONDS = 20.0  # seconds for a tool of the system


def check(setting: Setting) -> Iterator[Finding]:
    """Findings about the machine and its load."""
    here = machine()
    yield Finding("machine", "measured", f"{here.cpu}, {here.cores} cores, {in_bytes(here.memory_bytes)}", "")
    yield Finding("compared", "measured", f"{setting.subject.name} with {setting.reference.name}", "")
    with setting.subject.here():
        device = {name: value for name, value in sorted(mx.device_info().items()) if name != "resource_limit"}
    yield Finding(
        "device", "measured", ", ".join(f"{name} {value}" for name, value in device.items()), "", details=device
    )
    yield Finding(
        "memory for a model", "measured", in_bytes(usable_memory()), "", float(usable_memory()), None, "bytes"
    )
    if sys.platform == "darwin":
        yield from of_macos(setting)
    else:
        yield Finding("system", "measured", f"{platform.system()} {platform.release()} {platform.machine()}", "")
    swapped = swap_used()
    shown = "unknown" if swapped is None else in_bytes(swapped)
    much = swapped is not None and swapped > cpu.memory_bytes() // 10
    yield holds(
        "swap in use", not much, shown, "less than a tenth of the memory; else close other programs", otherwise="note"
    )
    virtual = is_virtual()
    yield holds(
        "virtual machine",
        not virtual,
        "yes" if virtual else "no",
        "no, or times are not the machine's",
        otherwise="note",
    )


def of_macos(setting: Setting) -> Iterator[Finding]:
    """Findings that only a Mac has."""
    system = platform.mac_ver()[0]
    version = tuple(int(part) for part in system.split(".")[:2] if part.isdigit())
    yield holds("macOS", version >= FIRST_SYSTEM, system, "14 or later")
    translated = sysctl("sysctl.proc_translated") == "1"
    yield holds("Rosetta", not translated, "yes" if translated else "no", "no: a Python for arm64")
    yield holds(
        "Metal",
        setting.on_gpu,
        setting.subject.name,
        "the GPU",
        otherwise="note" if mx.metal.is_available() else "wrong",
    )
    cores = re.search(r'"gpu-core-count"\s*=\s*(\d+)', output("/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d", "1"))
    yield Finding("GPU cores", "measured", cores[1] if cores else "unknown", "")
    slow = re.search(r"(?:lowpowermode|powermode)\s+1", output("/usr/bin/pmset", "-g")) is not None
    yield holds(
        "low power mode", not slow, "on" if slow else "off", "off, or times are not the machine's", otherwise="note"
    )


def chip() -> str:
    """The name of a Mac's chip; "" elsewhere."""
    return sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else ""


def swap_used() -> int | None:
    """Bytes of swap in use, None where the system does not say."""
    if sys.platform == "darwin":
        found = re.search(r"used = ([\d.]+)M", sysctl("vm.swapusage"))
        return round(float(found[1]) * 2**20) if found else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    table = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Swap")}
    return table.get("SwapTotal", 0) - table.get("SwapFree", 0)


def is_virtual() -> bool:
    """Whether a hypervisor shares out the processor, as far as the system says."""
    if sys.platform == "darwin":
        return sysctl("kern.hv_vmm_present") == "1"
    try:
        return (
            re.search(r"^flags\s*:.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
            is not None
        )
    except OSError:
        return False


def sysctl(name: str) -> str:
    """A value of macOS's kernel; "" where there is none."""
    return output("/usr/sbin/sysctl", "-n", name)


def output(*command: str) -> str:
    """What a command prints; "" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
