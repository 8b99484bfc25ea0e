"""The tables of README.md in tools/ that are made from registries: `python -m tests.write_tables` writes them anew."""

import re
from pathlib import Path

from tools.plans.methods import METHODS
from tools.plans.registry import list_choices
from tools.plans.rules import ALLOCATIONS

PAGE = Path(__file__).resolve().parents[1] / "tools" / "README.md"
TABLES = {"METHOD": METHODS, "ALLOCATION": ALLOCATIONS}


def write_tables(text: str) -> str:
    """The page with each table as its registry has it now."""
    for title, entries in TABLES.items():
        table = "\n".join(list_choices(title, entries.values()))
        text, count = re.subn(rf"^\| {title} \|.*(?:\n\|.*)*", lambda _, new=table: new, text, flags=re.MULTILINE)
        assert count == 1, f"the page has {count} tables of {title}"
    return text


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
