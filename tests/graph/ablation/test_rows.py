"""Gains are paired by seed, and the sentence at the end is no kinder than they."""

import math
from typing import Any

import pytest

from graph.ablation.rows import Row, average, conclude, judge_perplexity, list_differences, rank_arms, weigh_texts


def make_row(arm: str, seed: int, perplexity: float | None, **changes: Any) -> Row:
    fields = {
        "sparsity": 0.45,
        "reached": True,
        "kl": 0.25,
        "plan": "a plan",
        "trials": 4,
        "evaluated_tokens": 800,
        "seconds": 1.0,
    }
    return Row.model_validate({"arm": arm, "seed": seed, "perplexity": perplexity} | fields | changes)


def test_gains_are_paired_by_seed() -> None:
    rows = [make_row("kappa", seed, value) for seed, value in enumerate((20.0, 22.0, 24.0))]
    rows += [make_row("heuristic", seed, value) for seed, value in enumerate((19.5, 21.5, 23.5))]
    rows += [make_row("chat", 0, 21.0, agent_tokens=500)]
    by_arm = {standing.arm: standing for standing in rank_arms(rows)}
    assert [standing.arm for standing in rank_arms(rows)] == ["heuristic", "kappa", "chat"], "of one easy seed"
    assert by_arm["heuristic"].gain == (0.5, 0.0, 0.0)
    assert by_arm["kappa"].gain is None
    assert by_arm["chat"].gain == (-1.0, None, None)
    assert list_differences(rows) == [
        ("chat", "heuristic", 1, (1.5, None, None), (0.0, None, None)),
        ("chat", "kappa", 1, (1.0, None, None), (0.0, None, None)),
        ("heuristic", "kappa", 3, (-0.5, 0.0, 0.0), (0.0, 0.0, 1.0)),
    ]
    assert conclude(rows) == [
        "chat against heuristic: perplexity +1.500 over 1 seed, which says nothing about the noise.",
        "chat against kappa: perplexity +1.000 over 1 seed, which says nothing about the noise.",
        "heuristic against kappa: perplexity -0.500 ± 0.000 (95% t interval over 3 seeds, p < 0.001): better. "
        "KL +0.0 % ± 0.0 % (p = 1).",
    ]


def test_kl_is_compared_in_percent_and_not_where_it_was_not_measured() -> None:
    rows = [make_row("kappa", seed, 20.0, kl=kl) for seed, kl in enumerate((0.5, 0.4))]
    rows += [make_row("heuristic", seed, 19.0, kl=kl) for seed, kl in enumerate((0.45, 0.38))]
    [difference] = list_differences(rows)
    assert difference.kl is not None and difference.kl.value == pytest.approx(-7.5)
    rows += [make_row("grid", seed, 19.0, kl=kl) for seed, kl in enumerate((0.45, None))]
    assert [found.kl is None for found in list_differences(rows)] == [False, True, True]


def test_several_texts_are_judged_as_one_made_of_them() -> None:
    weights = {"code": 3.0, "prose": 1.0, "notes": 0.0}
    assert judge_perplexity({"code": 10.0, "prose": 20.0, "notes": None}, weights) == pytest.approx(10**0.75 * 20**0.25)
    assert weigh_texts({"code": 0.2, "prose": 0.6, "notes": None}, weights) == pytest.approx(0.3)
    assert weigh_texts({"code": 0.2, "prose": None, "notes": 1.0}, weights) is None
    assert judge_perplexity({"code": None, "prose": 20.0, "notes": 1.0}, weights) is None


def test_the_margin_is_that_of_the_t_interval() -> None:
    mean, margin, p = average([-1.0, -2.0, -3.0])
    assert mean == -2.0
    assert margin == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert p == pytest.approx(0.074180, abs=1e-6)
    assert average([0.0, 0.0]) == (0.0, 0.0, 1.0)


def test_two_standard_errors_over_three_seeds_are_not_better() -> None:
    step = math.sqrt(3) / 2  # of standard deviation 1, so that the mean of -1 is two standard errors from 0
    rows = [make_row("kappa", seed, 20.0) for seed in range(3)]
    rows += [make_row("heuristic", seed, 19.0 + place * step) for seed, place in enumerate((-1, 0, 1))]
    assert conclude(rows) == [
        "heuristic against kappa: perplexity -1.000 ± 2.151 (95% t interval over 3 seeds, p = 0.18): not more than "
        "the noise. KL +0.0 % ± 0.0 % (p = 1)."
    ]


def test_a_gain_inside_the_noise_is_called_so() -> None:
    rows = [make_row("kappa", seed, 20.0) for seed in range(3)]
    rows += [make_row("heuristic", seed, value) for seed, value in enumerate((19.0, 20.5, 19.5))]
    assert conclude(rows) == [
        "heuristic against kappa: perplexity -0.333 ± 1.897 (95% t interval over 3 seeds, p = 0.53): not more than "
        "the noise. KL +0.0 % ± 0.0 % (p = 1)."
    ]


def test_an_arm_that_was_not_finite_is_not_ranked() -> None:
    rows = [make_row("kappa", 0, 20.0), make_row("random", 0, None), make_row("random", 1, 21.0)]
    assert [standing.arm for standing in rank_arms(rows)] == ["kappa"]


def test_a_run_short_of_the_target_is_compared_with_nothing() -> None:
    rows = [make_row("kappa", 0, 20.0), make_row("heuristic", 0, 15.0, sparsity=0.3, reached=False)]
    assert [standing.arm for standing in rank_arms(rows)] == ["kappa"]
    assert list_differences(rows) == []
    assert conclude(rows) == [
        "heuristic, seed 0 stopped at 30.00%, short of the target, and is compared with nothing: give it more "
        "--evaluated-tokens, or a greater --tau behind --."
    ]
