"""Arms compared: rows are made once, gains are paired by seed, and the sentence at the end is no kinder than they."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import graph.ablate
from graph.ablate import (
    ARMS,
    AblateSettings,
    Row,
    ablate,
    conclude,
    draw_plan,
    list_arms,
    list_differences,
    list_seeds,
    main,
    rank_arms,
)
from tests.profiles import make_profile
from tests.team import gather_teams
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.plans.allocate import allocate
from tools.workbench.bench import Workbench


def make_settings(model: Path | str, out: Path, **changes: Any) -> AblateSettings:
    tiny = tiny_settings(model).model_dump() | {"out": str(out), "evaluated_tokens": 800}
    return AblateSettings.model_validate(tiny | {"arms": "kappa,random,search", "seeds": "0,1"} | changes)


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


def test_arms_with_chat_need_a_planner() -> None:
    assert list_arms(AblateSettings()) == ["heuristic", "kappa", "random", "search"]
    assert list_arms(AblateSettings(planner="openai:x")) == list(ARMS)
    assert list_arms(AblateSettings(arms="search, kappa")) == ["kappa", "search"]
    with pytest.raises(UserError, match=r"^the arm chat-alone needs a chat model: give --planner, such as openai:NAME"):
        list_arms(AblateSettings(arms="kappa,chat-alone"))
    with pytest.raises(UserError, match=r"^there is no arm 'kapa'; choose among chat, chat-alone, heuristic, kappa"):
        list_arms(AblateSettings(arms="kapa"))


def test_seeds_are_whole_numbers() -> None:
    assert list_seeds(AblateSettings.model_validate({"seeds": [0, 3, 0]})) == [0, 3]
    for wrong in ("", "one", "-1", "0.5"):
        with pytest.raises(UserError, match=r"^seeds '.*' must "):
            list_seeds(AblateSettings(seeds=wrong))


def test_a_random_plan_depends_on_seed_and_number_alone_and_can_be_carried_out() -> None:
    layers = [
        make_profile(block, kind, 1000, [0.001, 0.004, 0.01, 0.03, 0.1])
        for block in range(6)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    plans = [draw_plan(layers, 7, number) for number in range(40)]
    assert plans == [draw_plan(layers, 7, number) for number in range(40)]
    factors = [repr(adjustments) for _, adjustments in plans if adjustments]
    assert len(set(factors)) == len(factors) > 10
    assert {recipe.method for recipe, _ in plans} == {"two-sided", "sparsegpt", "two-sided-obs", "refit"}
    for recipe, adjustments in plans:
        assert (len(adjustments) == 4) == (recipe.allocation == "kappa")
        if recipe.allocation != "owl":  # these layers were never looked at for outliers
            assert sum(allocate(layers, 0.45, recipe, adjustments).zeros.values()) == 5400


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


def test_rows_are_made_once_and_written(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tiny_llama, tmp_path / "out")
    profiled: list[int] = []
    profile = Workbench.profile

    def count(bench: Workbench, *arguments: Any) -> str:
        profiled.append(bench.settings.seed)
        return profile(bench, *arguments)

    monkeypatch.setattr(Workbench, "profile", count)
    known = ablate(settings, [], Console(quiet=True))
    assert profiled == [0, 1], "once for each seed"
    assert [(row.arm, row.seed) for row in known.rows] == [
        (arm, seed) for seed in (0, 1) for arm in ("kappa", "random", "search")
    ]
    for row in known.rows:
        assert row.sparsity == pytest.approx(0.45, abs=5e-4)
        assert row.evaluated_tokens <= 800
    assert [row.trials for row in known.rows[:2]] == [1, 4]
    assert known.dense_perplexity is not None and known.dense_perplexity > 1
    stored = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert [row["perplexity"] for row in stored["rows"]] == [row.perplexity for row in known.rows]
    with (tmp_path / "out" / "ablate.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [row.arm for row in known.rows]
    text = (tmp_path / "out" / "ablate.md").read_text()
    assert "| kappa | 2 | " in text and "## Differences, paired by seed" in text
    assert {path.name for path in (tmp_path / "out").glob("ablate.*")} == {
        f"ablate.{kind}" for kind in ("csv", "json", "md", "png", "svg")
    }

    def refuse(*_arguments: Any) -> Row:
        raise AssertionError("a row is made again")

    monkeypatch.setattr(graph.ablate, "_make_row", refuse)
    assert ablate(settings, [], Console(quiet=True)).rows == known.rows
    with pytest.raises(UserError, match=r"holds an ablation with other settings \(target_sparsity\); choose another"):
        ablate(settings.model_copy(update={"target_sparsity": 0.5}), [], Console(quiet=True))


def test_random_plans_are_measured_side_by_side(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph.ablate, "_plot", lambda _known, _kind, _path: None)
    few = {"arms": "random", "seeds": "0", "evaluated_tokens": 3 * 192}
    alone = ablate(make_settings(tiny_llama, tmp_path / "alone", **few), [], Console(quiet=True)).rows
    teams = gather_teams(monkeypatch)
    shared = ablate(make_settings(tiny_llama, tmp_path / "shared", workers="2", **few), [], Console(quiet=True)).rows
    assert [row.model_dump(exclude={"seconds"}) for row in shared] == [
        row.model_dump(exclude={"seconds"}) for row in alone
    ]
    assert [len(team.handed) for team in teams] == [2], "two at once, and the third is shared"


def test_runs_of_the_graph_have_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="stopped")

    monkeypatch.setattr(graph.ablate.subprocess, "run", fail)
    settings = make_settings("no-model", tmp_path, workers="3", worker_threads=2)
    run = tmp_path / "runs" / "heuristic-0"
    for _ in range(2):
        with pytest.raises(UserError, match=r"^heuristic, seed 0: stopped; the same command goes on from there$"):
            graph.ablate._run_graph("heuristic", 0, settings, [], lambda *_: None)
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text("{}")
    assert {"--name", "--workers=3", "--worker-threads=2", "--no-memory"} <= set(commands[0])
    assert commands[1][3:] == [
        *("--runs-dir", str(tmp_path / "runs"), "--resume", "heuristic-0", "--workers=3", "--worker-threads=2")
    ]


def test_a_budget_below_one_trial_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_llama), "--window=64", "--validation-windows=3", "--evaluated-tokens=191"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: evaluated_tokens 191 allow no trial: one takes 192\n"
