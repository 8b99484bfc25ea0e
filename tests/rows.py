"""Files of rows, as texts and questions come in."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.texts.windows import SPLITS


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Write a row a line, or, where the file is not a .jsonl, all of them as one value; the source `file:PATH`."""
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return f"file:{path}"


def prose(start: int, words: int) -> str:
    """Words that do not repeat: numbers spelt in letters."""
    numbers = range(start, start + words)
    return " ".join("".join(chr(97 + n // power % 26) for power in (1, 26, 676)) for n in numbers)


def write_splits(directory: Path, common: str, splits: tuple[str, ...]) -> dict[str, str]:
    """Sources for the three splits, some with a common text near their beginning."""
    return {
        split: write_rows(
            directory / f"{split}.jsonl",
            [{"text": f"{prose(4000 * i, 3)} {common if split in splits else ''} {prose(4000 * i + 1000, 900)}"}],
        )
        for i, split in enumerate(SPLITS)
    }


def write_questions(path: Path, count: int) -> str:
    """So many questions that share no words, each with an answer of one word; the source."""
    return write_rows(path, [{"question": f"{prose(7 * i, 5)}?", "answer": prose(9000 + i, 1)} for i in range(count)])
