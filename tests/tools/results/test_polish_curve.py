"""KL over the tokens of a polish: which rows are points of one curve, and what is drawn of them."""

from pathlib import Path
from typing import Any

import matplotlib.image

from tests.comparisons import make_comparison, make_row, make_settings
from tools.results.comparison import Row, describe, write_comparison
from tools.results.schema import Polished
from tools.results.sparsity_curve import Point, list_curves


def make_polished(tokens: int, kl: float | None, sparsity: float = 0.6, recipe: str = "refit", **changes: Any) -> Row:
    known = Polished(tokens=tokens, passes=1, steps=2, planned_steps=2, before=0.5, after=0.4, seconds=1.0)
    polished = known.model_copy(update=changes)
    return make_row(f"{recipe}+polish{tokens}:kappa", sparsity, polished=polished, kl=kl)


def test_a_curve_begins_at_the_row_without_a_polish() -> None:
    rows = [make_polished(4000, 0.3), make_row("refit:kappa", 0.6, kl=0.5), make_polished(1000, 0.4)]
    assert list_curves(rows) == {
        "refit:kappa at 60%": [Point(0, 0.5, 0.01), Point(1000, 0.4, 0.01), Point(4000, 0.3, 0.01)]
    }


def test_recipes_sparsities_and_rows_that_came_to_nothing_are_told_apart() -> None:
    rows = [
        *(make_row("refit:kappa", 0.6), make_row("refit:kappa", 0.6)),  # none is polished
        *(make_polished(1000, 0.4, 0.45), make_polished(2000, None, 0.45)),  # one is finite
        *(make_polished(1000, 0.4, recipe="refit~clipped"), make_polished(2000, 0.3, recipe="refit~clipped")),
    ]
    assert list(list_curves(rows)) == ["refit~clipped:kappa at 60%"]


def test_it_is_drawn_beside_the_table_where_there_is_one(tmp_path: Path) -> None:
    settings = make_settings("no-model", tmp_path)
    plain = make_comparison(settings, make_row("refit:kappa"), make_polished(1000, 0.4))
    assert "polish.svg" not in describe(plain)
    known = make_comparison(settings, make_row("refit:kappa", 0.6), make_polished(1000, 0.4), make_polished(8000, 0.3))
    assert "![KL over tokens of a polish](polish.svg)" in describe(known)
    write_comparison(tmp_path, known)
    assert matplotlib.image.imread(tmp_path / "polish.png").std() > 0
    drawn = (tmp_path / "polish.svg").read_bytes()
    write_comparison(tmp_path, known)
    assert (tmp_path / "polish.svg").read_bytes() == drawn


def test_a_row_says_where_means_of_its_polish_were_rounded(tmp_path: Path) -> None:
    rows = make_polished(1000, 0.4), make_polished(2000, 0.3, means="bf16")
    told = describe(make_comparison(make_settings("no-model", tmp_path), *rows))
    assert "| 1,000 tokens, 1.0 s |" in told
    assert "| 2,000 tokens, 1.0 s, means of the optimiser in bf16 |" in told
