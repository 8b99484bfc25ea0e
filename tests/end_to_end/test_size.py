"""Runs that take whole parts away, from --target-size to a smaller stock model: rolled back, killed, replayed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_state,
    read_summary,
    read_trials,
    run_apart,
    run_here,
)
from tests.end_to_end.test_approve import APPROVE, Say, say
from tests.named import flag_texts
from tests.openai_server import OpenAIServer
from tests.team import gather_teams
from tests.tiny import save_tiny_gguf, tiny_settings
from tools import export
from tools.base.errors import BrokenPlan
from tools.base.progress import Progress
from tools.models.load import load_model
from tools.plans.work_order import WorkOrder
from tools.workbench.bench import Workbench
from tools.workbench.prune import Pruner

assert say

pytestmark = pytest.mark.figures

SIZE = ("--target-size", "0.75", "--tau", "9")


def flags(model: Path, *more: str) -> list[str]:
    return ["--name", "run", "--model", str(model), *TINY, *SIZE, *more]


@pytest.fixture(scope="module")
def easy(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by rule that nothing happens to."""
    home = tmp_path_factory.mktemp("size")
    return run_apart(home, *flags(tiny_llama, "--max-iterations", "3"))


def test_by_rule_to_a_smaller_stock_model(easy: Path, tiny_llama: Path) -> None:
    summary, state = read_summary(easy), read_state(easy)
    cut = summary["cut"]
    dense, smaller = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tiny_llama, easy / "model"))
    assert summary["status"] == "finished" and cut["size"] == 0.75
    assert cut["parameters"] == sum(p.numel() for p in smaller.parameters())
    assert cut["dense_parameters"] == sum(p.numel() for p in dense.parameters())
    assert cut["bytes"] / cut["dense_bytes"] == pytest.approx(0.75, abs=0.04), "whole units of a tiny model are large"
    assert smaller.config.intermediate_size == dense.config.intermediate_size - cut["neurons"]
    assert smaller.config.num_hidden_layers == dense.config.num_hidden_layers - len(cut["blocks"])
    assert state.config.target_sparsity == state.trials[0].sparsity and state.parts
    assert read_events(easy, "profile")[0]["top"] == [], "nothing is measured of single weights"
    card, report = ((easy / name).read_text() for name in ("model/README.md", "report.md"))
    assert f"cut to {cut['bytes'] / cut['dense_bytes']:.0%} of its bytes" in card and "Whole parts are gone" in card
    assert "prunable weights are gone (target " in report and "- structured" in card
    assert "of its bytes (asked for 75.00%)" in card and "of its bytes (asked for 75.00%)" in report
    assert {trial["verdict"] for trial in read_events(easy, "trial")[1:]} == {"accept", "rollback"}
    for trial in state.trials:
        assert trial.recipe is None and " cut · heads " in trial.plan

    # what was measured of the zeros holds of the smaller model
    ids = torch.arange(40)[None] % dense.config.vocab_size
    with torch.no_grad():
        assert torch.isfinite(smaller(input_ids=ids).logits).all()


def test_where_wanda_breaks_behind_pruned_predecessors_the_dense_model_is_profiled_for_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = Pruner.prune

    def break_wanda(bench: Workbench, profile: str, order: WorkOrder, progress: Progress) -> str:
        if order.cut is None and all(planned.recipe.in_order for planned in order.layers.values()):
            raise BrokenPlan("no memory")
        return prune(bench, profile, order, progress)

    monkeypatch.setattr(Pruner, "prune", break_wanda)
    run = run_apart(tmp_path, *flags(tiny_llama, "--max-iterations", "1"))
    assert read_summary(run)["wanda_statistics"] == "dense"
    [warning] = [event["text"] for event in read_events(run, "warning")]
    assert "its row is by the dense model's statistics" in warning


def test_a_cut_that_hurts_is_rolled_back_bit_for_bit_and_the_step_halved(
    trained_llama: Path, tmp_path: Path, command: Command
) -> None:
    given = ["--name", "run", "--model", str(trained_llama), *TINY, "--target-size", "0.6", "--tau", "0.000001"]
    assert command(*given, "--max-iterations", "2").code == 0
    run = tmp_path / "runs" / "run"
    first, second = read_state(run).trials
    assert first.verdict == "rollback" and second.sparsity == pytest.approx(first.sparsity / 2, abs=1e-4)
    (undone, *_) = read_events(run, "rollback")
    assert undone["checkpoint"] == "dense" and undone["layers"] > 0
    assert command(*given, "--max-iterations", "1", "--name", "one").code == 0
    one = tmp_path / "runs" / "one"
    summary = read_summary(one)
    assert (summary["status"], summary["asked"]) == ("short-of-target", "size") and "cut" not in summary
    assert " prunable weights are gone (target " in (one / "report.md").read_text()
    card = (one / "model" / "README.md").read_text()
    assert ", not cut\n" in card and "Nothing was taken away: no cut that was tried was kept." in card
    kept = transformers.AutoModelForCausalLM.from_pretrained(one / "model").state_dict()
    dense = transformers.AutoModelForCausalLM.from_pretrained(trained_llama).state_dict()
    assert all(torch.equal(kept[name], dense[name]) for name in dense)


def test_a_person_edits_a_cut_before_it_is_made(tiny_llama: Path, tmp_path: Path, command: Command, say: Say) -> None:
    say('{"cut": {"refit": false, "keep": "blocks 0"}}', '{"cut": {"blocks": 0, "heads": 1}}', "accept", "accept")
    done = command(*flags(tiny_llama, "--max-iterations", "2"), *APPROVE)
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "runs" / "run"
    planned, edited = read_events(run, "plan")[:2]
    assert (planned["planner"], edited["planner"]) == ("heuristic", "you")
    first, second = read_state(run).trials
    assert first.plan.endswith(" cut · heads by KL curves · not blocks 0 · no refit")
    assert first.order == edited["order"]
    assert second.plan.endswith(" cut · heads 1 · 0 blocks · not blocks 0 · no refit"), "what an edit leaves out stays"
    replayed = command("--replay", "run", "--name", "again")
    assert (replayed.code, replayed.err) == (0, "")
    assert read_trials(tmp_path / "runs" / "again") == read_trials(run)


@pytest.mark.parametrize(
    "halt",
    [
        Halt("profile", "tools.workbench.cuts:measure_curves", after=True),
        Halt("prune", "tools.workbench.cuts:Cuts._install", 2, after=True),
        Halt("prune", "tools.workbench.cuts:Cuts._keep", 3),
        Halt("rollback", "tools.workbench.weights:Weights.install", 3, after=True),
        Halt("finish", "graph.nodes.finish:export_model", after=True),
    ],
)
def test_killed_and_resumed_it_is_the_same_bytes(halt: Halt, easy: Path, tiny_llama: Path, tmp_path: Path) -> None:
    given = flags(tiny_llama, "--max-iterations", "3")
    assert fork(tmp_path, *given, "--runs-dir", str(tmp_path / "killed"), halt=halt).finish().code < 0
    assert run_here("--resume", "run", "--runs-dir", str(tmp_path / "killed")) == 0
    killed = tmp_path / "killed" / "run"
    assert read_trials(killed) == read_trials(easy)
    assert_same_weights(killed, easy)


def test_of_a_streamed_model_it_is_the_same_but_not_timed(easy: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run = run_apart(tmp_path, *flags(tiny_llama, "--max-iterations", "3", "--device", "stream"))
    assert read_trials(run) == read_trials(easy)
    assert_same_weights(run, easy)
    mine, theirs = read_summary(run)["cut"], read_summary(easy)["cut"]
    untimed = dict.fromkeys(("decoded_per_second", "dense_decoded_per_second"))
    assert mine == theirs | untimed and theirs["decoded_per_second"] > 0
    assert "went; how fast it decodes was not timed, for it was on no one device" in (run / "report.md").read_text()


def test_replayed_and_with_workers_it_is_the_same(
    easy: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = str(easy.parent)
    assert run_here("--replay", "run", "--name", "again", "--runs-dir", runs) == 0
    assert_same_weights(easy.parent / "again", easy)
    capsys.readouterr()
    assert run_here("--replay", "run", "--align", "3", "--target-size", "0.5", "--runs-dir", runs) == 2
    assert capsys.readouterr().err == (
        "error: a replay takes away what run 'run' took away; leave target_size and align out\n"
    )
    mine = ["--workers", "2", "--runs-dir", str(tmp_path), "--max-iterations", "3"]
    teams = gather_teams(monkeypatch)
    assert run_here(*flags(tiny_llama, *mine)) == 0
    assert len(teams) == 1
    assert_same_weights(tmp_path / "run", easy)


def test_a_chat_model_is_shown_the_parts_and_shares_the_cut_out(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    plans: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        system, question = (message["content"] for message in body["messages"][:2])
        target = float(question.partition("target sparsity ")[2].partition(",")[0])
        assert '"cut":' in system and '"recipe"' not in system and "{" not in question.partition("<data trials>")[0]
        if len(body["messages"]) > 2:  # handed back
            assert "recipe is about single weights" in body["messages"][-1]["content"]
            return plans[-1]
        cut = {"heads": 1} if "round 1:" in question else {"blocks": 0}
        plans.append({"hypothesis": "Less KL.", "sparsity": target, "cut": cut, "reason": "As the table says."})
        return plans[-1] | ({"recipe": {"method": "wanda"}} if len(plans) == 1 else {})

    with OpenAIServer(answer) as server:
        given = flags(tiny_llama, "--planner", server.planner("m"), "--max-iterations", "2")
        assert command(*given).code == 0
        asked = [request.messages[1]["content"] for request in server.requests]
    assert "columns: block, heads.1, neurons." in asked[0]
    assert "Whole blocks in the order in which they go" in asked[0]
    assert ", which leaves 0.75 of its bytes. Round 1 of" in asked[0]
    state = read_state(tmp_path / "runs" / "run")
    assert [trial.plan.partition(" ")[2] for trial in state.trials] == [
        "cut · heads by KL curves · 0 blocks",
        "cut · heads 1",
    ]
    recorded = [event["details"]["cut"] for event in read_events(tmp_path / "runs" / "run", "plan")]
    assert json.loads(json.dumps(recorded))[1]["heads"] == 1


def test_a_chat_model_probes_cuts_before_it_plans_one(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    told: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        question = body["messages"][1]["content"]
        target = float(question.partition("target sparsity ")[2].partition(",")[0])
        plans = [{"sparsity": target, "cut": {"heads": heads}} for heads in (0, 1)]
        turn = len(body["messages"]) // 2
        assert "Prices in tokens: probe " in question
        if turn > 1:
            answered = body["messages"][-1]["content"].partition("<data")[2].splitlines()
            told.append(json.loads(answered[1]))
        steps = [
            {"tool": "predict", "arguments": {"plan": plans[0]}},
            {"tool": "probe", "arguments": {"plans": plans, "whole": True}},
            {"hypothesis": "As probed.", **plans[0], "reason": "It was probed."},
        ]
        return steps[turn - 1]

    with OpenAIServer(answer) as server:
        given = flags(tiny_llama, "--planner", server.planner("m"), "--max-iterations", "1")
        assert command(*given).code == 0
    predicted, probed = told
    assert (predicted["heads"], predicted["neurons"], predicted["blocks"]) == (0, 32, [])
    first, second = probed["plans"]
    assert first["predicted_kl"] == predicted["predicted_kl"] and second["kl_minus_probe"]["1"][0] > 0
    assert [made["plan"].partition(" ")[2] for made in probed["plans"]] == ["cut · heads 0", "cut · heads 1"]
    run = tmp_path / "runs" / "run"
    (trial,) = read_state(run).trials
    assert trial.kl == pytest.approx(first["kl"], rel=1e-3) and trial.plan.endswith("cut · heads 0")
    assert [event["tool"] for event in read_events(run, "tool")] == ["predict", "probe"]


def test_a_reflector_writes_notes_of_cuts_and_ends_the_run(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    note = {"text": "One group of heads fewer hurts.", "trials": [1]}
    said = [{"note": note}, {"stop": True, "reason": "It is done."}]
    with OpenAIServer(said) as server:
        agents = ("--reflector", server.planner("fine"), "--max-iterations", "8", "--patience", "8", "--memory")
        assert command(*flags(tiny_llama, *agents)).code == 0
        asked = [request.messages for request in server.requests]
    run = tmp_path / "runs" / "run"
    state = read_state(run)
    assert state.stop == "at the target, the reflector stops: It is done." and len(state.trials) == len(asked)
    (kept,) = state.notes
    assert (kept.text, kept.trials, kept.cuts) == (note["text"], [1], True)
    assert f"by round 1: {note['text']}" in asked[1][1]["content"] and state.lessons == []
    with OpenAIServer([{"sparsity": state.config.target_sparsity}]) as server:
        given = flags(tiny_llama, "--planner", server.planner("fine"), "--max-iterations", "1", "--memory")
        assert command("--name", "next", *given[2:]).code == 0
        assert f"%, by round 1: {note['text']}" in server.requests[0].messages[1]["content"]


def test_what_is_cut_of_a_gguf_file_becomes_one(
    easy: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = export.main(list(arguments))
        said = capsys.readouterr()
        return code, said.err if code else said.out

    source = save_tiny_gguf(tmp_path / "tiny.gguf")
    assert command(*flags(source, "--max-iterations", "1")).code == 0
    made = tmp_path / "run.gguf"
    code, said = write("runs/run", "--gguf", str(made))
    assert code == 0 and said.endswith(", read back to the bit\n")
    smaller = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "run" / "model")
    read, _ = load_model(tiny_settings(made))
    assert read.config.intermediate_size == smaller.config.intermediate_size < 48
    ids = torch.arange(40)[None]
    assert torch.equal(read(ids).logits, smaller(ids).logits)
    for arguments, problem in (
        (("runs/run", "--gguf", str(made)), f"{made} exists already; choose another --gguf"),
        (("runs/run", "--gguf", "made"), "made does not end in .gguf; choose another --gguf"),
        (
            (str(source), "--gguf", "made.gguf"),
            f"{source} is no run and no model directory; what is written is a model",
        ),
        ((str(easy), "--gguf", "made.gguf"), f"the model of {easy} was read from no .gguf file; name one of the dense"),
    ):
        code, said = write(*arguments)
        assert code == 2 and problem in said
    assert write(str(easy), "--gguf", "made.gguf", "--dense", str(source))[0] == 0
    assert [path.name for path in tmp_path.glob(".*.gguf")] == []


def test_named_texts_are_read_by_what_they_count_and_bound_what_is_kept(
    tiny_llama: Path, trained_llama: Path, tmp_path: Path, command: Command
) -> None:
    texts = flag_texts(tmp_path)
    given = [*flags(tiny_llama, "--max-iterations", "2")[2:], *texts]
    assert command("--name", "plain", *given).code == 0
    runs = tmp_path / "runs"
    assert {len(trial["texts"]) for trial in read_events(runs / "plain", "trial")} == {2}
    assert "| code | " in (runs / "plain" / "report.md").read_text()
    # the rule reads no words: what is made of the goal is what the weights say, and parts are measured after that
    assert command("--name", "goal", *given, "--goal", "Code must stay").code == 0
    assert_same_weights(runs / "goal", runs / "plain")
    assert command("--replay", "goal", "--name", "again").code == 0
    assert_same_weights(runs / "again", runs / "goal")
    assert command("--name", "other", *given[:-1], "code=0,prose=1").code == 0
    assert read_summary(runs / "other")["mask_sha256"] != read_summary(runs / "plain")["mask_sha256"]
    given[given.index(str(tiny_llama))] = str(trained_llama)  # which a cut hurts
    assert command("--name", "bound", *given, "--text-bounds", "prose=0.000001").code == 0
    first = read_events(runs / "bound", "trial")[1]
    assert (first["verdict"], "prose" in first["reason"]) == ("rollback", True)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            ("--polish-tokens", "64"),
            "target_size takes whole parts away, and polish_tokens fits the survivors of zeros",
        ),
        (("--max-layer-sparsity", "0.3"), "max_layer_sparsity bounds zeros, and a cut takes whole parts away"),
        (("--protect", "blocks 0"), "target_size takes whole parts away, and protect names layers that are never"),
        (("--target-size", "0.05"), "target_size 0.05 cannot be met: "),
    ],
)
def test_what_does_not_go_together_is_refused(
    more: tuple[str, ...], problem: str, tiny_llama: Path, command: Command
) -> None:
    outcome = command(*flags(tiny_llama, *more))
    assert outcome.code == 2 and problem in outcome.err
