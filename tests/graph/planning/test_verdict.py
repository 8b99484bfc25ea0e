"""The verdict on a trial: tau towards the target, paired KL at it, nothing that is not finite."""

import pytest

from graph.config import RunConfig
from graph.nodes.reflect import after_reflect
from graph.planning.plan import Plan
from graph.planning.verdict import decide_stop, heed_facts, judge
from graph.state import State
from tests.situations import make_trial
from tools.measure.recall import Retention
from tools.plans.recipe import Recipe
from tools.results.losses import Evaluation
from tools.results.trial import Trial

CONFIG = RunConfig()
DENSE = make_trial(0, "accept", 0.0, Recipe(), perplexity=10.0)
AT_TARGET = make_trial(3, "accept", 0.45, Recipe(), perplexity=11.0)


def losses(perplexity: float, *kl: float) -> Evaluation:
    import math

    return Evaluation(nll=[math.log(perplexity)] * len(kl), kl=list(kl))


@pytest.mark.parametrize(("perplexity", "verdict"), [(11.49, "accept"), (11.51, "rollback")])
def test_tau(perplexity: float, verdict: str) -> None:
    found, reason = judge(CONFIG, 0.3, losses(perplexity, 0.1, 0.1), DENSE, losses(10, 0, 0))
    assert found == verdict
    assert "11.50 = (1 + 0.15) x 10.00" in reason


def test_an_equal_trial_is_no_improvement() -> None:
    same = losses(11, 0.1, 0.1)
    assert judge(CONFIG, 0.45, same, AT_TARGET, same)[0] == "rollback"


def test_nothing_less_sparse_replaces_what_reached_the_target() -> None:
    found, reason = judge(CONFIG, 0.3, losses(10.1, 0.01, 0.01), AT_TARGET, losses(11, 0.1, 0.1))
    assert (found, "off the target" in reason) == ("rollback", True)


@pytest.mark.parametrize(
    "broken",
    [Evaluation(nll=[1.0, None], kl=[0.1, 0.1]), Evaluation(nll=[1.0, 1.0], kl=[0.1, None]), losses(1e300, 0.1, 0.1)],
)
def test_what_is_not_finite_is_rolled_back(broken: Evaluation) -> None:
    if broken.perplexity is not None:
        broken = Evaluation(nll=[800.0, 800.0], kl=broken.kl)  # finite losses whose exponential is not
    assert judge(CONFIG, 0.3, broken, DENSE, losses(10, 0, 0)) == ("rollback", "the loss is not finite")


@pytest.mark.parametrize(
    ("kl", "verdict", "figures"),
    [
        (
            (0.09, 0.11, 0.1, 0.08),
            "accept",
            "-0.0100 ± 0.0000 on 4 windows, better with probability 1.000, at least 0.75",
        ),
        (
            (0.05, 0.12, 0.11, 0.1),
            "accept",
            "-0.0100 ± 0.0135 on 4 windows, better with probability 0.743, at least 0.7",
        ),
        (
            (0.09, 0.12, 0.11, 0.1),
            "rollback",
            "+0.0000 ± 0.0041 on 4 windows, better with probability 0.500, below 0.75",
        ),
    ],
)
def test_at_the_same_sparsity_the_likelier_weights_are_kept(kl: tuple[float, ...], verdict: str, figures: str) -> None:
    config = RunConfig(accept_probability=0.7 if figures.endswith("0.7") else 0.75)
    accepted = losses(11, 0.1, 0.12, 0.11, 0.09)
    assert judge(config, 0.4502, losses(99, *kl), AT_TARGET, accepted) == (verdict, f"KL {figures}")
    short = make_trial(2, "accept", 0.3, Recipe())
    assert judge(config, 0.3, losses(99, *kl), short, accepted) == (verdict, f"KL {figures}"), "short of the target"


def state_with(*trials: Trial) -> State:
    return State(run="r", dense=DENSE, trials=list(trials), iteration=trials[-1].iteration)


def test_the_loop_ends_after_its_iterations_or_its_patience() -> None:
    rollbacks = [make_trial(i, "rollback", 0.45, Recipe()) for i in (4, 5, 6)]
    assert decide_stop(state_with(AT_TARGET, *rollbacks[:2])) == ""
    assert "3 rounds in a row" in decide_stop(state_with(AT_TARGET, *rollbacks))
    assert "8 iterations" in decide_stop(state_with(make_trial(8, "rollback", 0.4, Recipe())))
    assert decide_stop(state_with(make_trial(7, "rollback", 0.45, Recipe()))) == "", "short of the target, it goes on"


def test_a_pattern_is_reached_in_one_step_whatever_the_perplexity() -> None:
    config = RunConfig(pattern="2:4")
    assert config.target_sparsity == 0.5
    found, reason = judge(config, 0.5, losses(30.0, 0.9, 0.9), DENSE, losses(10, 0, 0))
    assert (found, reason) == ("accept", "2:4 has no smaller step; from here only what lowers the KL is kept")
    at_target = make_trial(1, "accept", 0.5, Recipe(), perplexity=30.0)
    assert judge(config, 0.5, losses(29.0, 0.95, 0.97), at_target, losses(30.0, 0.9, 0.9))[0] == "rollback"


def test_a_new_profile_where_config_or_an_accepted_plan_asks_for_one() -> None:
    accepted, rolled_back = make_trial(1, "accept", 0.3, Recipe()), make_trial(1, "rollback", 0.3, Recipe())
    for config in (False, True):
        for plan in (False, True):
            asked = {"config": RunConfig(reprofile=config), "plan": Plan(sparsity=0.3, reprofile=plan)}
            state = state_with(accepted).model_copy(update=asked)
            assert after_reflect(state) == ("profile" if config or plan else "plan")
            assert after_reflect(state_with(rolled_back).model_copy(update=asked)) == "plan"
            assert after_reflect(state.model_copy(update={"stop": "it is done"})) == "finish"


@pytest.mark.parametrize(
    ("least", "share", "verdict", "reason"),
    [
        (0.0, 0.2, "accept", "good"),
        (0.9, 0.9, "accept", "good; answer probability kept 0.900 ± 0.010"),
        (
            0.9,
            0.899,
            "rollback",
            "answer probability kept 0.899 ± 0.010, below 0.9, although good",
        ),
    ],
)
def test_facts_that_must_not_be_lost(least: float, share: float, verdict: str, reason: str) -> None:
    assert heed_facts(least, Retention(share, 0.01), "accept", "good") == (verdict, reason)


def test_facts_save_no_plan_and_must_be_finite() -> None:
    assert heed_facts(0.5, Retention(1.0, 0.01), "rollback", "bad") == ("rollback", "bad")
    assert heed_facts(0.5, None, "accept", "good") == ("rollback", "the probability of an answer is not finite")
    assert heed_facts(0.0, None, "accept", "good") == ("accept", "good")


@pytest.mark.parametrize(
    ("tokens", "stop"), [(384, ""), (409, "409 of at most 600 tokens were evaluated, and another trial takes more")]
)
def test_the_run_ends_when_no_trial_fits(tokens: int, stop: str) -> None:
    config = RunConfig(window=64, validation_windows=3, max_evaluated_tokens=600)
    assert decide_stop(State(config=config, iteration=2, evaluated_tokens=tokens)) == stop
