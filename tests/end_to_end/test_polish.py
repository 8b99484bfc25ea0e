"""A run whose plans may polish: the rule tries it first at the target, and every report says that it was used."""

from pathlib import Path

import pytest

from graph.config import RunConfig
from graph.planning.orders import count_polish_tokens
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_run_config,
    read_summary,
    read_trials,
    run_apart,
)
from tools.base.errors import ImpossiblePlan
from tools.plans.costs import count_polish
from tools.plans.recipe import Recipe
from tools.results.sentences import list_outcome

pytestmark = pytest.mark.figures

TOKENS = 64 * 120


@pytest.fixture(scope="module")
def polishing(trained_llama: Path) -> list[str]:
    model = ("--name", "run", "--model", str(trained_llama), *TINY)
    return [*model, "--max-iterations", "4", "--target-sparsity", "0.6", "--tau", "10", "--polish-tokens", str(TOKENS)]


@pytest.fixture(scope="module")
def polished(polishing: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    return run_apart(tmp_path_factory.mktemp("polished"), *polishing)


def test_the_rule_polishes_at_the_target_and_every_report_says_so(polished: Path) -> None:
    trials = read_events(polished, "trial")[1:]
    assert [trial["plan"] for trial in trials][-2:] == ["60.0% refit:kappa-mask", "60.0% refit+polish:kappa-mask"]
    assert trials[-1]["verdict"] == "accept" and trials[-1]["kl"] < trials[-2]["kl"]
    summary, config = read_summary(polished), read_run_config(polished)
    told = summary["polished"]
    assert told["tokens"] == TOKENS == config.polish_tokens and told["passes"] == 40
    assert 0 < told["steps"] <= told["planned_steps"] == 40 and told["after"] < told["before"]
    words = f"polished on 7,680 tokens (held-out KL {told['before']:.4f} → {told['after']:.4f}, 40 passes)"
    for name in ("report.md", "report.html", "model/README.md"):
        assert f"The surviving weights were {words}." in (polished / name).read_text(encoding="utf-8"), name
    assert words in list_outcome({**summary, "model_directory": "", "report": ""})
    assert summary["evaluated_tokens"] == 4 * config.validation_tokens + count_polish(config, TOKENS)


def test_stopped_in_its_polish_and_gone_on_with_it_ends_with_the_same_weights(
    polishing: list[str], polished: Path, tmp_path: Path, command: Command
) -> None:
    stop = Halt("prune", "tools.polish.gradients:Divergence.differentiate", 7, kind="stop")
    stopped = fork(tmp_path, *polishing, halt=stop).finish()
    run = tmp_path / "runs" / "run"
    assert (stopped.code, stopped.err) == (1, "") and read_events(run, "node")[-1]["node"] == "prune"
    assert fork(tmp_path, "--resume", "run", halt=Halt("prune", stop.target, 9)).finish().code < 0, "killed as well"
    assert command("--resume", "run").code == 0
    assert read_trials(run) == read_trials(polished)
    assert_same_weights(run, polished)
    times = {"seconds": 0}
    assert read_summary(run)["polished"] | times == read_summary(polished)["polished"] | times


def test_a_plan_that_polishes_where_no_tokens_are_allowed_is_refused_in_one_line() -> None:
    recipe = Recipe(polish=True)
    with pytest.raises(ImpossiblePlan, match=r"^recipe .refit\+polish:kappa. polishes, on no tokens; give"):
        count_polish_tokens(recipe, RunConfig())
    with pytest.raises(ImpossiblePlan, match=r"^polish on 9,999 tokens; this run allows 9,000 \(polish_tokens\)$"):
        count_polish_tokens(recipe.model_copy(update={"polish_tokens": 9999}), RunConfig(polish_tokens=9000))


def test_a_run_that_allows_less_than_one_window_of_polish_does_not_begin(command: Command) -> None:
    outcome = command("--polish-tokens", "100", "--window", "256")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: polish_tokens: polish on 100 tokens is less than one window of 256; give it more\n"
    outcome = command("--polish-tokens", "1000", "--calibration-windows", "1")
    assert outcome.code == 2 and "polish holds calibration windows out, and there is one" in outcome.err
