"""Gains are paired by seed, and the sentence at the end is no kinder than they."""

from typing import Any

from graph.ablation.rows import Row, conclude, list_differences, rank_arms


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
    assert [standing.arm for standing in rank_arms(rows)] == ["chat", "heuristic", "kappa"]
    assert (by_arm["heuristic"].gain, by_arm["heuristic"].gain_error) == (0.5, 0.0)
    assert (by_arm["kappa"].gain, by_arm["kappa"].gain_error) == (None, None)
    assert (by_arm["chat"].gain, by_arm["chat"].gain_error) == (-1.0, None)
    assert list_differences(rows) == [
        ("chat", "heuristic", 1, 1.5, None),
        ("chat", "kappa", 1, 1.0, None),
        ("heuristic", "kappa", 3, -0.5, 0.0),
    ]
    assert conclude(rows) == [
        "chat against heuristic: perplexity +1.500 over 1 seed, one seed says nothing about the noise.",
        "chat against kappa: perplexity +1.000 over 1 seed, one seed says nothing about the noise.",
        "heuristic against kappa: perplexity -0.500 ± 0.000 over 3 seeds, better by more than 2 standard errors.",
    ]


def test_a_gain_inside_the_noise_is_called_so() -> None:
    rows = [make_row("kappa", seed, 20.0) for seed in range(3)]
    rows += [make_row("heuristic", seed, value) for seed, value in enumerate((19.0, 20.5, 19.5))]
    assert conclude(rows) == [
        "heuristic against kappa: perplexity -0.333 ± 0.441 over 3 seeds, within 2 standard errors: not more than "
        "the noise."
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
