"""Seals: a short hash behind what a run writes, by which whoever reads it notices that it was changed since.

A JSON file has it as its last field, `seal`, and so has every line of a log, where it covers the line before as well:
none can be left out, added or moved. A seal is also about whose the content is, so that two files that changed places
are noticed. It protects from damage, and from nobody who means it. What has no seal was written by an earlier version,
and is taken as it is.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tools.base.errors import UserError
from tools.base.files import write_json

FIELD = "seal"
DIGITS = 16

_SEAL = rb', "seal": "([0-9a-f]{%d})"\}' % DIGITS
_ANYWHERE, _AT_END = re.compile(_SEAL), re.compile(_SEAL + rb"\Z")
_LENGTH = len(b', "seal": ""}') + DIGITS


class BrokenSeal(UserError):
    """A file is not what was written; the message is one line that says which, and what to do."""


# JSON files


def write_sealed(path: Path, value: dict[str, Any], owner: str) -> None:
    """Write readable JSON as `write_json` does, with the seal of what it says and of `owner`."""
    write_json(path, seal_value(value, owner))


def seal_value(value: dict[str, Any], owner: str) -> dict[str, Any]:
    """A JSON object, as it will be read (with lists, and names that are text), with its seal behind it."""
    value = json.loads(json.dumps(value))
    return value | {FIELD: _seal_value(value, owner)}


def is_whole(value: dict[str, Any], owner: str) -> bool:
    """Whether what was read is what was written for `owner`, or has no seal."""
    content = {name: known for name, known in value.items() if name != FIELD}
    return FIELD not in value or value[FIELD] == _seal_value(content, owner)


def read_sealed(path: Path, owner: str, advice: str) -> dict[str, Any]:
    """What `write_sealed` wrote, without its seal. Raises BrokenSeal, with the `advice`, where it is anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BrokenSeal(f"{path} is damaged: it is not JSON; {advice}") from error
    if not isinstance(value, dict):
        raise BrokenSeal(f"{path} is damaged: it is not a JSON object; {advice}")
    if not is_whole(value, owner):
        raise BrokenSeal(f"{path} is damaged, or another's: its content does not match its seal; {advice}")
    value.pop(FIELD, None)
    return value


def _seal_value(value: dict[str, Any], owner: str) -> str:
    return _hash(owner, json.dumps(value, sort_keys=True).encode())


def _hash(before: str, content: bytes) -> str:
    return hashlib.sha256(before.encode() + b"\n" + content).hexdigest()[:DIGITS]


# Logs


def seal_line(line: bytes, before: str) -> bytes:
    """A line, a JSON object without its end of line, with a seal that covers what is `before` it too.

    That is the seal of the line before, or whose log it is for the first.
    """
    return b'%s, "%s": "%s"}' % (line[:-1], FIELD.encode(), _hash(before, line).encode())


def seal_lines(lines: Iterable[bytes], before: str) -> bytes:
    """The text of a log of these lines, whose seals, if they have some, are renewed."""
    sealed = []
    for line in lines:
        sealed.append(seal_line(split_line(line)[0], before))
        before = split_line(sealed[-1])[1]
    return b"".join(line + b"\n" for line in sealed)


def split_line(line: bytes) -> tuple[bytes, str]:
    """(the line without its seal, the seal; "" where it has none)."""
    found = _AT_END.search(line[-_LENGTH:])
    return (line[:-_LENGTH] + b"}", found[1].decode()) if found else (line, "")


def follow_line(line: bytes, before: str) -> str:
    """What the seal of the next line covers."""
    return split_line(line)[1] or _hash(before, line)


def check_lines(lines: Iterable[bytes], before: str, *, sealed: bool) -> Iterator[tuple[bytes, str]]:
    """Each line of a log without its seal and its end, and its seal; the first may have none if not all are `sealed`.

    Nor has the last one that a crash cut short, or one that a sealed line follows: that seal covers it too. Raises
    ValueError with the number of the line, from 1, that is not what was written.
    """
    doubtful = 0
    for number, whole in enumerate(lines, 1):
        line = whole.rstrip(b"\n")
        content, seal = split_line(line)
        if seal:
            if seal != _hash(before, content):
                raise ValueError(doubtful or number)
            sealed, doubtful = True, 0
        elif sealed and (line != whole or _ANYWHERE.search(line)):
            doubtful = doubtful or number
        before = follow_line(line, before)
        yield content, seal
    if doubtful:
        raise ValueError(doubtful)
