"""Two named texts, of words that they do not share."""

from pathlib import Path
from typing import Any

import pytest

from tests.rows import prose, write_rows
from tools.workbench.polish import Polisher

WEIGHTS = {"code": 3, "prose": 1}


def write_texts(directory: Path, words: int = 2500) -> dict[str, str]:
    """The sources of the texts `code` and `prose`."""
    calls = prose(9000, words).replace(" ", "();\n")
    return {
        "code": write_rows(directory / "code.jsonl", [{"text": calls}]),
        "prose": write_rows(directory / "prose.jsonl", [{"text": prose(0, words)}]),
    }


def flag_texts(directory: Path) -> list[str]:
    """The same, three to one, as flags."""
    flags = [flag for name, source in write_texts(directory).items() for flag in ("--text", f"{name}={source}")]
    return [*flags, "--text-weights", "code=3,prose=1"]


def name_texts(directory: Path, **changes: Any) -> dict[str, Any]:
    """The same as settings."""
    return {"text": write_texts(directory), "text_weights": WEIGHTS, **changes}


def watch_polish(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the windows that polishes read."""
    read: list[int] = []
    schedule = Polisher._schedule
    monkeypatch.setattr(Polisher, "_schedule", lambda *given: read.extend((found := schedule(*given)).windows) or found)
    return read
