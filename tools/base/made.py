"""What a run says of itself in `run.json`, its config, its result, and whether its model is what it wrote."""

from functools import cache
from pathlib import Path
from typing import Any

from tools.base.errors import DamagedFile, UserError
from tools.base.files import hash_file, read_json
from tools.base.options import read_yaml

FORMAT = 2
"""Of a run's files. Those of another format are refused."""


def read_made(directory: Path) -> dict[str, Any]:
    """`run.json`. Raises DamagedFile, and UserError where it is missing or of another format."""
    path = directory / "run.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: what it belongs to is no run of this version of Billhook; begin it again")
    made = read_json(path, advise(directory))
    if made.get("format") != FORMAT:
        raise UserError(f"run {directory.name!r} is of another version of Billhook; begin it again")
    return made


def advise(directory: Path) -> str:
    """What to do about a file of a run that cannot be made again."""
    return f"put it back as it was, or make the run again with --config {directory / 'config.yaml'}"


def read_config_values(directory: Path) -> dict[str, Any]:
    """`config.yaml` of a run. Raises UserError where it cannot be read, or is not what the run was begun with."""
    begun, values = read_made(directory)["config"], read_yaml(directory / "config.yaml")
    if changed := [name for name, value in begun.items() if values.get(name) != value]:
        what = f"its config.yaml is not what the run was begun with ({', '.join(changed[:5])})"
        raise DamagedFile(f"run {directory.name!r} cannot be read: {what}")
    return values


def read_result(directory: Path) -> dict[str, Any] | None:
    """`summary.json` of a run; None where there is none. Raises DamagedFile, and UserError as `read_made`."""
    path = directory / "summary.json"
    if not path.is_file():
        return None
    read_made(directory)
    return read_json(path, advise(directory))


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
    """Raises DamagedFile where a file of a run's `model/` is not what the run wrote."""
    result = read_result(directory)
    for name, digest in (result.get("files", {}) if result else {}).items():
        path = directory / "model" / name
        if not path.is_file() or hash_once(path) != digest:
            what = "is damaged: its content does not match its hash" if path.is_file() else "is missing"
            raise DamagedFile(f"{path} {what}; {advise(directory)}")
