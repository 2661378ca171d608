"""What a process has in memory, for the benchmarks that tell of it. Linux only: it reads /proc."""

from __future__ import annotations

from pathlib import Path


def memory(field: str = "VmRSS", pid: int | str = "self") -> float:
    """Megabytes of a process: now (VmRSS), or at most since `forget_peak` (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024 / 1e6


def forget_peak() -> None:
    """Let the peak of this process begin from here."""
    Path("/proc/self/clear_refs").write_text("5")
