"""How much memory there is, and how much of it is free: no more than the group of processes that this one is in may
have, as in a container or under a scheduler."""

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux tells of groups of processes (cgroups)."""
OWN = Path("/proc/self/cgroup")
"""Where it tells which ones this process is in."""


SHARE = 0.25
"""Of the memory that is free: what may be held of it that could as well lie on disk."""


def count_room() -> float:
    """Bytes of memory for what could as well lie on disk, as what passes between the blocks of a streamed model."""
    return SHARE * count_free()


def has_room(size: int) -> bool:
    """Whether so many bytes of it are to be held."""
    return size <= count_room()


def count_free() -> int:
    """Bytes of memory that a process may still take: pages of files that are only kept make room where that is told."""
    told = Path("/proc/meminfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    free = available[0] if available else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *(limit.free for limit in _list_limits())])


def count_memory() -> int:
    """Bytes of memory that there are for this process and all others of its group."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *(limit.bytes for limit in _list_limits())])


def measure_peak() -> int:
    """The most bytes of memory that this process held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # macOS tells bytes, others KiB


def give_back() -> None:
    """Let the system have memory that was let go of; glibc else keeps what lies between pieces that are in use."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class _Limit(NamedTuple):
    """What a group of processes may have."""

    bytes: int
    free: int


def _list_limits() -> list[_Limit]:
    """Those of the groups that this process is in; none where there are none, or the system has no such groups."""
    lines = OWN.read_text(encoding="utf-8").splitlines() if OWN.is_file() else []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = GROUPS / "memory" if controllers else GROUPS
        group = root / path.lstrip("/")
        # in a container its own group is the root of what it sees, wherever the system says that it is
        places = [place for place in (group, *group.parents) if place.is_relative_to(root)]
        found += [limit for place in places if (limit := _read_limit(place, second=not controllers))]
    return found


def _read_limit(group: Path, *, second: bool) -> _Limit | None:
    """What a group may have, as the second version of such groups tells it or the first; None without a limit."""
    most, used, kept = (
        ("memory.max", "memory.current", "inactive_file")
        if second
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        limit, taken = (int((group / name).read_text(encoding="utf-8")) for name in (most, used))
        told = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):  # "max" is no limit
        return None
    return _Limit(limit, max(limit - taken + int(told.get(kept, 0)), 0))
