"""What a run says of itself in `run.json`, and the files that are held against it: config, result and model."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tools.base.files import hash_file
from tools.base.options import read_yaml
from tools.base.seals import BrokenSeal, read_sealed


class Made(NamedTuple):
    """`run.json`, as far as other files are held against it."""

    mark: str = ""
    """Whose the files are: it is no other run's. Empty in runs of an earlier version."""
    log: str = ""
    """Whose the log is: of a fork, which begins with the log of its run, that run's."""
    config: Mapping[str, Any] | None = None
    """What `config.yaml` must say; None in runs of an earlier version."""


def read_made(directory: Path) -> Made:
    """What `run.json` says of the other files; nothing where there is none. Raises BrokenSeal."""
    path = directory / "run.json"
    if not path.is_file():
        return Made()
    made = read_sealed(path, path.name, advise(directory))
    return Made(made.get("mark", ""), made.get("log", ""), made.get("config"))


def advise(directory: Path) -> str:
    """What to do about a file of a run that cannot be made again."""
    return f"put it back as it was, or make the run again with --config {directory / 'config.yaml'}"


def read_config_values(directory: Path) -> dict[str, Any]:
    """`config.yaml` of a run. Raises UserError where it cannot be read, or is not what the run was begun with."""
    values, begun = read_yaml(directory / "config.yaml"), read_made(directory).config
    if begun is not None and (changed := [name for name, value in begun.items() if values.get(name) != value]):
        what = f"its config.yaml is not what the run was begun with ({', '.join(changed[:5])})"
        raise BrokenSeal(f"run {directory.name!r} cannot be read: {what}")
    return values


def read_result(directory: Path) -> dict[str, Any] | None:
    """`summary.json` of a run; None where there is none. Raises BrokenSeal."""
    path = directory / "summary.json"
    return read_sealed(path, read_made(directory).mark, advise(directory)) if path.is_file() else None


def hash_once(path: Path) -> str:
    """As `hash_file`, of a file that is not read again while its time and size are what they were."""
    return _hash_once(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash_once(path: Path, _changed: int, _size: int) -> str:
    """A command asks several times where a model is, and models are large."""
    return hash_file(path)


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory, by name."""
    return {path.name: hash_once(path) for path in sorted(directory.iterdir()) if path.is_file()}


def check_model(directory: Path) -> None:
    """Raises BrokenSeal where a file of a run's `model/` is not what the run wrote."""
    result = read_result(directory)
    for name, digest in (result.get("files", {}) if result else {}).items():
        path = directory / "model" / name
        if not path.is_file() or hash_once(path) != digest:
            what = "is damaged: its content does not match its hash" if path.is_file() else "is missing"
            raise BrokenSeal(f"{path} {what}; {advise(directory)}")
