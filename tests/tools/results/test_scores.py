"""Figures of tasks side by side, and what must not be."""

from typing import Any

import pytest

from tools.base.errors import UserError
from tools.results.losses import Result, compare_scores, subtract
from tools.results.schema import Score


def make_score(model: str, **protocol: Any) -> Score:
    versions = {"torch": "2.9", "lm-eval": "0.4.13"}
    return Score(
        model=model,
        task="mmlu",
        metric="acc",
        value=0.5,
        error=0.1,
        samples=4,
        protocol={"shots": 5, "limit": 10, "versions": versions, **protocol},
    )


def test_figures_of_different_protocols_are_not_compared() -> None:
    compare_scores([make_score("dense"), make_score("pruned")])
    other = make_score("pruned", limit=20, versions={"torch": "2.8", "lm-eval": "0.4.13"})
    with pytest.raises(UserError) as told:
        compare_scores([make_score("dense"), other])
    assert str(told.value) == (
        "mmlu acc of dense and of pruned must not be compared; their protocols differ in "
        "limit (10 and 20), versions.torch (2.9 and 2.8)"
    )


def test_differences_are_paired_where_there_is_a_value_for_each_question() -> None:
    first = Result(score=make_score("dense").model_copy(update={"value": 0.5}), values=[1.0, 1.0, 0.0, 0.0])
    second = Result(score=make_score("pruned").model_copy(update={"value": 0.25}), values=[1.0, 0.0, 0.0, 0.0])
    assert subtract(second, first) == (-0.25, 0.25, True)
    unpaired = subtract(Result(score=second.score, values=[]), first)
    assert unpaired is not None and unpaired.value == -0.25 and unpaired.error == pytest.approx(0.1 * 2**0.5)
    assert not unpaired.paired
    broken = Result(score=second.score.model_copy(update={"value": None, "error": None}), values=[])
    assert subtract(broken, first) is None
    with pytest.raises(UserError, match="must not be compared"):
        subtract(Result(score=make_score("pruned", limit=20), values=[]), first)
