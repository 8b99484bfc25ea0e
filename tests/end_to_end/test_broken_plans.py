"""Plans that break while they are carried out: rolled back with a reason, and the run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.statistics.table
import tools.workbench.curves
import tools.workbench.layer_pruning
import tools.workbench.losses
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    assert_same_weights,
    let_go,
    read_events,
    read_state,
    read_summary,
    read_trials,
    read_weights,
    same_bits,
)
from tests.openai_server import OpenAIServer
from tools.base.errors import UnknownStatistics
from tools.plans.recipe import Recipe

pytestmark = pytest.mark.figures

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SINGULAR = ValueError("the second moment is not positive definite, not even with damping 100")
SAID = "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"

Break = Callable[..., list[Recipe]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


@pytest.fixture
def break_pruning(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Has the nth layer of every plan of these methods break; the recipes of all layers that were begun."""

    def arm(error: BaseException, *methods: str, layer: int = 3) -> list[Recipe]:
        begun: list[Recipe] = []
        prune_layer = tools.statistics.table.prune_layer

        def prune(recipe: Recipe, *rest: Any) -> Any:
            begun.append(recipe)
            if recipe.method in methods and begun.count(recipe) % layer == 0:
                raise error
            return prune_layer(recipe, *rest)

        monkeypatch.setattr(tools.workbench.layer_pruning, "prune_layer", prune)
        return begun

    return arm


def nodes(run: Path) -> list[str]:
    return [event["node"] for event in read_events(run, "node")]


@pytest.mark.parametrize(("error", "said"), [(NO_MEMORY, SAID), (SINGULAR, str(SINGULAR))], ids=["memory", "singular"])
def test_the_round_is_rolled_back_and_the_rule_takes_another_method(
    error: Exception, said: str, flags: list[str], easy: Path, run: Path, command: Command, break_pruning: Break
) -> None:
    begun = break_pruning(error, "refit")
    done = command(*flags, "--max-iterations", "4")
    assert (done.code, done.err) == (0, "")
    _, broke, *others = read_state(run).trials
    assert (broke.verdict, broke.broken, broke.measured) == ("rollback", True, False)
    assert (broke.perplexity, broke.kl, broke.tokens) == (None, None, 0)
    assert broke.reason == f"pruning layer model.layers.0.self_attn.v_proj: {said}"
    assert f"trial 2: broke, 45.0% refit:kappa-mask: {broke.reason}\n" in done.out
    assert nodes(run)[6:11] == ["plan", "prune", "rollback", "reflect", "plan"], "nothing was there to be validated"
    assert read_trials(run)[0] == read_trials(easy)[0]
    assert broke.order not in [trial.order for trial in others]
    assert [recipe.method for recipe in begun].count("refit") == 3, "not a layer more of what broke"
    assert {trial.recipe.method for trial in others if trial.recipe} == {"two-sided"}
    assert others[0].plan == "45.0% two-sided:kappa" and broke.reason in read_events(run, "plan")[2]["reason"]
    assert read_summary(run)["rollbacks"] == sum(trial.verdict == "rollback" for trial in (broke, *others))
    assert [lesson.iteration for lesson in read_state(run).lessons].count(2) == 0, "nothing was learnt of it"
    assert f"| 2 | 45.00% |  |  | {broke.predicted_kl:.4f} | broke | " in (run / "report.md").read_text()
    assert (run / "report.html").read_text().count("✖ broke") == 1


def test_the_weights_are_those_of_before(flags: list[str], run: Path, command: Command, break_pruning: Break) -> None:
    assert command("--name", "alone", *flags[2:], "--max-iterations", "1").code == 0
    break_pruning(NO_MEMORY, "refit", layer=5)
    assert command(*flags, "--max-iterations", "2").code == 0
    assert read_state(run).trials[-1].broken
    assert_same_weights(run, run.parent / "alone")


@pytest.mark.parametrize("broken", ["validation", "questions"])
def test_what_cannot_be_measured_is_rolled_back(
    broken: str, flags: list[str], run: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    if broken == "questions":
        rows = [{"question": f"What is number {i}?", "answer": ("stone", "river", "seven")[i % 3]} for i in range(8)]
        (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = ["--questions", f"file:{tmp_path / 'qa.jsonl'}", "--question-pairs", "4"]
    module, name = (
        ("measure.losses", "measure_losses") if broken == "validation" else ("measure.recall", "read_answers")
    )
    measure, calls = getattr(__import__(f"tools.{module}", fromlist=[name]), name), 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (5 if broken == "validation" else 2):  # the dense model's three windows, or batch, come first
            raise MemoryError("no room")
        return measure(*arguments, **options)

    monkeypatch.setattr(f"tools.{module}.{name}", fail)
    done = command(*flags, *asked, "--max-iterations", "2")
    assert (done.code, done.err) == (0, "")
    broke, other = read_state(run).trials
    what = "measuring the losses" if broken == "validation" else "asking questions"
    assert (broke.broken, broke.reason) == (True, f"{what}: out of memory (no room)")
    assert other.measured and read_summary(run)["achieved_sparsity"] > 0
    assert nodes(run)[1:6] == ["plan", "prune", "validate", "rollback", "reflect"]


def test_when_every_plan_breaks_the_dense_model_is_the_result(
    flags: list[str], tiny_llama: Path, run: Path, command: Command, break_pruning: Break
) -> None:
    break_pruning(NO_MEMORY, "refit", "two-sided")
    done = command(*flags, "--max-iterations", "9")
    assert (done.code, done.err) == (0, "")
    assert [(trial.broken, trial.plan) for trial in read_state(run).trials] == [
        (True, "30.0% two-sided:kappa"),
        (True, "30.0% refit:kappa-mask"),
    ]
    stop = "every lever of the rule has been tried, but for refit and two-sided, which broke while it was carried out"
    assert f"note: {stop}\n" in done.out
    assert (read_summary(run)["status"], read_summary(run)["achieved_sparsity"]) == ("short-of-target", 0)
    assert f"The loop ended because {stop}." in (run / "report.md").read_text()
    dense, left = read_weights(tiny_llama), read_weights(run / "model")
    assert all(same_bits(dense[name], left[name]) for name in dense)


def test_a_pattern_that_breaks_is_tried_with_masks(
    flags: list[str], run: Path, command: Command, break_pruning: Break
) -> None:
    break_pruning(NO_MEMORY, "refit")
    done = command(*flags, "--pattern", "2:4", "--target-sparsity", "0.5", "--max-iterations", "2")
    assert (done.code, done.err) == (0, "")
    assert [trial.verdict for trial in read_state(run).trials] == ["rollback", "accept"]
    assert read_summary(run)["achieved_sparsity"] == 0.5


def test_at_the_target_a_lever_that_breaks_costs_a_round(
    flags: list[str], easy: Path, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = tools.workbench.layer_pruning.collect_moments

    def fail(*arguments: Any, **options: Any) -> Any:
        if options.get("purpose") == "pruning":
            raise NO_MEMORY
        return collect(*arguments, **options)

    monkeypatch.setattr(tools.workbench.layer_pruning, "collect_moments", fail)
    done = command(*flags)
    assert (done.code, done.err) == (0, "")
    assert [trial.verdict for trial in read_state(run).trials] == ["accept", "accept", "rollback"]
    assert read_state(run).trials[2].reason == f"pruning: {SAID}"
    assert "note: at the target, 1 rounds in a row brought no improvement" in done.out, "patience counts it"
    assert read_summary(run)["mask_sha256"] == read_summary(easy)["mask_sha256"]


@pytest.mark.parametrize("error", [TypeError("a mistake"), OSError(28, "No space left on device")])
def test_mistakes_and_full_disks_still_stop_the_run_and_it_can_be_resumed(
    error: Exception, flags: list[str], easy: Path, run: Path, command: Command, break_pruning: Break
) -> None:
    break_pruning(error, "refit")
    if isinstance(error, OSError):
        assert command(*flags).code == 2
    else:
        with pytest.raises(type(error)):
            command(*flags)
        let_go()
    assert nodes(run)[-1] == "prune" and len(read_events(run, "trial")) == 2
    break_pruning(error)
    assert command("--resume", "run").code == 0
    assert read_trials(run) == read_trials(easy)


def test_a_profile_that_breaks_is_one_line_and_can_be_gone_on_with(
    flags: list[str], easy: Path, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tools.statistics.moments.add_second_moment", lambda *_: (_ for _ in ()).throw(NO_MEMORY))
        stopped = command(*flags)
    assert (stopped.code, stopped.err) == (1, "")
    assert stopped.out.splitlines()[-2:] == [
        f"stopped: profiling the model: {SAID}; free some and go on, or begin anew with a shorter --window or --dtype "
        "bf16",
        "resume with: python -m graph.run --resume run",
    ]
    assert command("--resume", "run").code == 0
    assert read_trials(run) == read_trials(easy)


OVERFLOWN = "what flows back through a block is not finite in fp16; use --dtype bf16 or fp32"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            NO_MEMORY,
            f"profiling the model: {SAID}; free some and go on, or begin anew with a shorter --window or --dtype bf16",
        ),
        (UnknownStatistics(OVERFLOWN), OVERFLOWN),
    ],
)
def test_a_second_profile_that_breaks_leaves_the_first(
    error: Exception, said: str, flags: list[str], run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, calls = tools.workbench.profiles.build_profile, 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return build(*arguments, **options)

    monkeypatch.setattr("tools.workbench.profiles.build_profile", fail)
    done = command(*flags, "--reprofile", "--max-iterations", "2")
    assert (done.code, done.err) == (0, "")
    assert f"warning: {said}; the profile stays that of before\n" in done.out
    assert [trial.verdict for trial in read_state(run).trials] == ["accept", "accept"]


# A chat planner


OWN_CURVES = {"sparsity": 0.4, "recipe": {"method": "refit", "curves": "method"}, "reason": "by what it leaves"}
MASKS = {"sparsity": 0.4, "recipe": {"method": "two-sided", "refit": False}, "reason": "masks alone"}


def chat(model: Path, server: OpenAIServer, *more: str) -> list[str]:
    return ["--name", "run", "--model", str(model), *TINY, "--planner", server.planner("fine"), "--no-memory", *more]


def test_curves_that_break_are_a_round_whose_plan_is_not_taken_again(
    tiny_llama: Path, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.workbench.curves, "cut_to_levels", lambda *_: (_ for _ in ()).throw(SINGULAR))
    with OpenAIServer([OWN_CURVES, OWN_CURVES, MASKS]) as server:
        done = command(*chat(tiny_llama, server, "--max-iterations", "2"))
    assert (done.code, done.err) == (0, "")
    broke, other = read_state(run).trials
    reason = f"KL curve of layer model.layers.1.self_attn.q_proj: {SINGULAR}"
    assert (broke.broken, broke.order, broke.reason) == (True, "", reason)
    assert nodes(run)[1:4] == ["plan", "rollback", "reflect"]
    assert f"refit:kappa; broke unmeasured, and would again: {reason}" in server.requests[1].messages[1]["content"]
    first, again, taken = read_events(run, "reply")
    problem = "this is the plan of round 1, which broke while it was carried out and would again: KL curve of layer"
    assert (first["problem"], taken["problem"]) == ("", "") and problem in again["problem"]
    assert other.verdict == "accept" and other.plan == "40.0% two-sided:kappa"


def test_a_probe_that_breaks_answers_with_the_reason(
    tiny_llama: Path, run: Path, command: Command, break_pruning: Break
) -> None:
    strong = {"sparsity": 0.4, "recipe": {"method": "refit"}}
    script = [
        {"tool": "probe", "arguments": {"plan": strong, "tokens": 64}},
        {"tool": "probe", "arguments": {"plans": [strong, MASKS | {"sparsity": 0.3}], "tokens": 64}},
        MASKS,
    ]
    break_pruning(NO_MEMORY, "refit")
    with OpenAIServer(script) as server:
        done = command(*chat(tiny_llama, server, "--max-iterations", "1"))
    assert (done.code, done.err) == (0, "")
    alone, both = (json.loads(tool["answer"]) for tool in read_events(run, "tool"))
    reason = f"pruning layer model.layers.0.self_attn.v_proj: {SAID}"
    assert alone == {"error": reason}
    assert both["plans"][0]["error"] == reason and both["plans"][1]["kl"] > 0
    assert [trial.plan for trial in read_state(run).trials] == ["40.0% two-sided:kappa"]


# Again


def test_a_replay_takes_a_broken_round_as_it_was(
    flags: list[str], run: Path, command: Command, break_pruning: Break
) -> None:
    break_pruning(NO_MEMORY, "refit")
    assert command(*flags, "--max-iterations", "3").code == 0
    begun = break_pruning(NO_MEMORY)
    replayed = command("--replay", "run")
    assert (replayed.code, replayed.err) == (0, "")
    assert "note: the masks are those of run run " in replayed.out and "parting" not in replayed.out
    assert "refit" not in {recipe.method for recipe in begun}
    again = run.parent / "run-replay"
    assert [t.reason for t in read_state(again).trials] == [t.reason for t in read_state(run).trials]


def test_a_replay_that_breaks_where_the_record_did_not_says_so(
    flags: list[str], easy: Path, command: Command, break_pruning: Break
) -> None:
    break_pruning(NO_MEMORY, "refit")
    replayed = command("--replay", "run", "--runs-dir", str(easy.parent), "--name", "again")
    assert replayed.code == 0
    reason = f"pruning layer model.layers.0.self_attn.v_proj: {SAID}"
    assert f"trial 2: it broke here only ({reason})\n" in replayed.out
