"""The paper's three figures, and the table that they stand in."""

import pytest

from tools.base.options import check_options
from tools.experiments.comparison import CompareSettings
from tools.plans.jobs import list_jobs
from tools.results.paper import MMLU, PRESETS, PUBLISHED, Measured, compare_with, describe_tasks
from tools.results.schema import Score


def score(task: str, metric: str, value: float | None) -> Score:
    error = None if value is None else 0.01
    return Score(
        model="m", task=task, metric=metric, value=value, error=error, samples=50, protocol={"task": task, "shots": 5}
    )


def measured(
    recipe: str, perplexity: float | None, mmlu: float | None, answers: float | None, logprob: float | None = None
) -> Measured:
    scores = [score("mmlu", "acc", mmlu), score("freebaseqa", "exact_match", answers)]
    scores.append(score("freebaseqa", "logprob", logprob))
    return Measured(f"`{recipe}`" if recipe else "dense", recipe, "", 0.45 if recipe else 0.0, perplexity, scores)


DENSE = measured("", 10.0, 0.6, 0.4, -2.0)
OURS = measured("refit:kappa", 13.1, 0.468, 0.19, -2.5)


@pytest.mark.parametrize(
    ("baseline", "figures"),
    [
        (measured("structured:flap", 20.0, 0.3, 0.01, -4.0), ("+56.0%", "19.0 ×", "−69.0%", "−75.0%")),
        (measured("structured:depth", None, None, 0.0), ("–", "19.00% beside none", "–", "–")),
        (measured("wanda:uniform", 10.0, 0.0, None, -2.4), ("–", "–", "–", "+25.0%")),
    ],
)
def test_figures_beside_a_baseline(baseline: Measured, figures: tuple[str, str, str, str]) -> None:
    assert compare_with(OURS, baseline, DENSE) == figures


def test_the_table() -> None:
    said = describe_tasks(DENSE, [OURS, measured("structured:flap", 20.0, 0.3, 0.01)])
    assert "| model | sparsity | perplexity | mmlu acc | freebaseqa exact_match | freebaseqa logprob |" in said
    assert "| dense | 0.00% | 10.00 | 0.6000 ± 0.0100 | 0.4000 ± 0.0100 | -2.0000 ± 0.0100 |" in said
    assert "| `refit:kappa` | 45.00% | 13.10 | 0.4680 ± 0.0100 | 0.1900 ± 0.0100 | -2.5000 ± 0.0100 |" in said
    assert "| `structured:flap` | +56.0% | 19.0 × | −69.0% | – |" in said
    assert f"| *{PUBLISHED[0]}* | *+56 %* | *19 ×* | *−69 %* |  |" in said
    assert "- task mmlu, shots 5" in said


def test_baselines_stand_beside_ours_at_their_sparsity() -> None:
    wanda = measured("wanda:uniform", 20.0, 0.3, 0.01)
    pattern = wanda._replace(name="`wanda:uniform` 2:4", pattern="2:4", sparsity=0.5)
    more = ("two-sided-obs:kappa", "refit8~clipped:evolution", "structured+refit:kappa", "sparsegpt:kappa-mask@0.8")
    own = [wanda._replace(name="own", recipe=recipe) for recipe in more]
    rows = [OURS, wanda, *own, OURS._replace(sparsity=0.6), wanda._replace(name="later", sparsity=0.599), pattern]
    said = "\n".join(describe_tasks(DENSE, rows)).split("## `refit:kappa` at ")[1:]
    assert [[line.split(" |")[0][2:] for line in table.split("\n") if line.startswith("| `")] for table in said] == [
        ["`refit:kappa` beside", "`wanda:uniform`", "`wanda:uniform` 2:4"],
        ["`refit:kappa` beside", "`wanda:uniform` 2:4"],
    ]
    assert said[0].startswith("45.00% beside the baselines, as") and "| later | " in said[1]
    assert describe_tasks(DENSE, [OURS._replace(sparsity=0.7), wanda])[-1] == ""


def test_differences_are_told_question_by_question_where_the_answers_are_known() -> None:
    dense = DENSE._replace(answers={"mmlu acc": [1.0, 1.0, 0.0, 1.0], "freebaseqa exact_match": [1.0, 0.0, 0.0, 1.0]})
    ours = OURS._replace(answers={"mmlu acc": [1.0, 0.0, 0.0, 1.0]})
    wanda = measured("wanda:uniform", 20.0, 0.3, 0.01)._replace(answers={"mmlu acc": [0.0, 0.0, 0.0, 1.0]})
    said = describe_tasks(dense, [ours, wanda])
    assert said[2].endswith(" In brackets: less the dense model's, question by question.")
    assert "| dense | 0.00% | 10.00 | 0.6000 ± 0.0100 | 0.4000 ± 0.0100 | -2.0000 ± 0.0100 |" in said
    # The figures are the scores', the errors those of (0, -1, 0, 0) and (-1, -1, 0, 0), over the root of 4.
    assert (
        "| `refit:kappa` | 45.00% | 13.10 | 0.4680 ± 0.0100 (−0.1320 ± 0.2500) | 0.1900 ± 0.0100 | -2.5000 ± 0.0100 |"
        in said
    )
    assert any("0.3000 ± 0.0100 (−0.3000 ± 0.2887)" in line for line in said)
    assert "| `wanda:uniform` | +56.0% (+0.1680 ± 0.2500) | 19.0 × | −69.0% | – |" in said


def test_answers_that_were_not_asked_for_alike_are_not_subtracted() -> None:
    """A later row may have been made with another version of the harness, and the table is written all the same."""
    answers = {"mmlu acc": [1.0, 0.0, 0.0, 1.0]}
    dense, ours = DENSE._replace(answers=answers), OURS._replace(answers=answers)
    other = [score.model_copy(update={"protocol": {**score.protocol, "version": "2"}}) for score in ours.scores]
    assert ours.differ(dense, MMLU) == "−0.1320 ± 0.0000"
    assert ours._replace(scores=other).differ(dense, MMLU) == ""


def test_without_tasks_or_without_ours_there_is_nothing_to_tell() -> None:
    assert describe_tasks(DENSE._replace(scores=[]), [OURS._replace(scores=[])]) == []
    assert not any("2601.09694" in line for line in describe_tasks(DENSE, [measured("wanda:uniform", 20.0, 0.3, 0.1)]))


def test_the_preset_is_a_comparison() -> None:
    settings = check_options(CompareSettings, {**PRESETS["paper"]})
    assert settings.tasks == ["mmlu", "freebaseqa"]
    titles = [job.title for job in list_jobs(settings.recipes, settings.sparsity)]
    assert titles == [
        *("wanda:uniform at 45%", "sparsegpt:uniform at 45%", "refit:kappa at 45%"),
        *("structured:flap at 45%", "structured:depth at 45%"),
        *("wanda:uniform at 2:4", "sparsegpt:uniform at 2:4", "refit:uniform at 2:4"),
    ]
