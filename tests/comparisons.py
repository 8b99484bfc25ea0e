"""Comparisons of recipes, asked for and made up."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.tiny import tiny_settings
from tools.experiments.comparison import CompareSettings, compare
from tools.results.comparison import Comparison, Row
from tools.results.schema import Reach, describe_protocol

EVOLUTION_TOKENS = 10_000
REACH = Reach(of_blocks=1.0, of_model=0.8, prunable=8000)


def make_settings(model: Path | str, out: Path, **changes: Any) -> CompareSettings:
    tiny = tiny_settings(model).model_dump() | {"out": str(out), "evolution_tokens": EVOLUTION_TOKENS}
    return CompareSettings.model_validate(tiny | changes)


def make_row(recipe: str = "wanda:uniform", sparsity: float = 0.5, **changes: Any) -> Row:
    """A row made up."""
    method, _, allocation = recipe.partition(":")
    fields: dict[str, Any] = {
        **{"recipe": recipe, "method": method, "allocation": allocation, "sparsity": sparsity, "pattern": ""},
        "statistics": "sequential" if method in ("wanda", "sparsegpt", "alps") else "dense",
        **{"achieved_sparsity": sparsity, "perplexity": 12.5, "dense_perplexity": 10.0, "kl": 0.25, "kl_error": 0.01},
        **{"seconds": 1.5, "allocation_seconds": 0.0, "peak_memory_bytes": 1_000_000, "evaluated_tokens": 0},
        "protocol": describe_protocol(tiny_settings("no-model"), "validation"),
    }
    return Row.model_validate(fields | changes)


def make_comparison(settings: CompareSettings, *rows: Row) -> Comparison:
    given = settings.model_dump(exclude={"recipes", "sparsity", "out"})
    return Comparison(
        settings=given, profile="none", profile_seconds=2.0, dense_perplexity=10.0, reach=REACH, rows=list(rows)
    )


def run_comparison(settings: CompareSettings) -> tuple[Comparison, list[str]]:
    """(the comparison, the lines it printed)."""
    console = Console(file=io.StringIO())
    known = compare(settings, console)
    return known, console.file.getvalue().splitlines()
