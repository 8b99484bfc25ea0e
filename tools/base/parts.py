"""The libraries that Billhook is made of, checked before any of them is imported."""

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NoReturn


def check_parts() -> None:
    """End the process with one line on stderr and status 2 where a library is missing or too old."""
    try:
        lines = requires("billhook") or []
    except PackageNotFoundError:
        return  # imported from a folder that was never installed: there is no list
    try:
        from packaging.requirements import Requirement
    except ImportError:
        _refuse("packaging is missing", "packaging")
    for part in map(Requirement, lines):
        if part.marker and not part.marker.evaluate({"extra": ""}):
            continue
        try:
            present = version(part.name)
        except PackageNotFoundError:
            _refuse(f"{part.name} is missing", f"{part.name}{part.specifier}")
        if not part.specifier.contains(present, prereleases=True):
            _refuse(f"{part.name} {present} does not fit", f"{part.name}{part.specifier}")


def _refuse(what: str, wanted: str) -> NoReturn:
    print(f"error: {what}; run: {sys.executable} -m pip install '{wanted}'", file=sys.stderr)
    raise SystemExit(2)
