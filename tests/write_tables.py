"""The tables of README.md in tools/ that are made from registries: `python -m tests.write_tables` writes them anew."""

import re
from pathlib import Path
from typing import NamedTuple

from tools.base.settings import TEXT_FORMS
from tools.measure.benchmarks import find_own_tasks
from tools.plans.methods import METHODS
from tools.plans.recipe import Named, list_named
from tools.plans.rules import ALLOCATIONS, WAYS_OF_PARTS
from tools.texts.sources import SOURCES

PAGE = Path(__file__).resolve().parents[1] / "tools" / "README.md"


class Entry(NamedTuple):
    """What a table tells of an entry."""

    name: str
    sentence: str


def list_tables() -> dict[str, list[Named]]:
    """The entries of every table, by its title."""
    return {
        "METHOD": [*METHODS.values()],
        "ALLOCATION": [*ALLOCATIONS.values()],
        "STRUCTURED": [*WAYS_OF_PARTS.values()],
        "TEXT": [Entry(form, source.sentence) for form, source in zip(TEXT_FORMS, SOURCES.values(), strict=True)],
        "TASK of ours": [Entry(name, task.sentence) for name, task in find_own_tasks().items()],
    }


def write_tables(text: str) -> str:
    """The page with each table as its registry has it now."""
    for title, entries in list_tables().items():
        table = "\n".join(list_named(title, entries))
        text, count = re.subn(rf"^\| {title} \|.*(?:\n\|.*)*", lambda _, new=table: new, text, flags=re.MULTILINE)
        assert count == 1, f"the page has {count} tables of {title}"
    return text


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
