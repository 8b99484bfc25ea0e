"""How much memory this machine has free."""

import os
from pathlib import Path


def count_free() -> int:
    """Bytes of memory that a process may still take: pages of files that are only kept make room where that is told."""
    told = Path("/proc/meminfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
