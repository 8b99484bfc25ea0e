"""`python -m graph.ablate` with arms that are runs of the graph, in processes of their own, most of them forks."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graph.ablate import main
from graph.ablation import graph_arms
from tests.end_to_end.helpers import TINY, at_home, end_forks, fork, read_run_config, read_summary
from tests.named import WEIGHTS, flag_texts
from tests.openai_server import OpenAIServer

SMALL = TINY[: TINY.index("--patience")]
"""What of these flags is about the model's texts."""
PLANS: list[dict[str, Any]] = [{"sparsity": 0.45, "recipe": {"method": "two-sided", "refit": False}}]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs begin in milliseconds, in forks of a process that has imported everything."""

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        python, *module = command[:3]
        assert (python, module) == (sys.executable, ["-m", "graph.run"])
        done = fork(Path.cwd(), *command[3:], **os.environ).finish()
        return subprocess.CompletedProcess(command, done.code, done.out, done.err)

    monkeypatch.setattr(graph_arms.subprocess, "run", run)
    yield
    end_forks()


@pytest.mark.usefixtures("forked")
def test_runs_of_the_graph_are_rows(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--model", str(tiny_llama), "--seeds", "3", "--evaluated-tokens", "400"]
    with at_home(tmp_path), OpenAIServer(PLANS) as server:
        chat = ["--arms", "heuristic,chat-alone", "--planner", server.planner("fine")]
        prices = ["--", "--planner-price-input", "2", "--agent-timeout", "20", "--planner-fallback", "heuristic"]
        assert main([*flags, *chat, *prices]) == 0
        rows = {row["arm"]: row for row in json.loads(Path("ablate/ablate.json").read_text())["rows"]}
        assert list(rows) == ["chat-alone", "heuristic"]
        for arm, row in rows.items():
            summary = json.loads(Path(f"ablate/runs/{arm}-3/summary.json").read_text())
            assert row["perplexity"] == summary["perplexity"]["pruned"]
            assert (row["seed"], row["trials"], row["evaluated_tokens"]) == (3, 2, 384)
            assert row["sparsity"] == pytest.approx(0.45, abs=5e-4)
        assert {arm: row["by_rule"] for arm, row in rows.items()} == {"chat-alone": 1, "heuristic": 0}
        assert re.search(
            r"\| chat-alone \| 3 \| [^|]+ \| [^|]+ \| 2 \(1 by rule\) \|", Path("ablate/ablate.md").read_text()
        )
        assert rows["heuristic"]["agent_tokens"] == 0 and rows["heuristic"]["cost"] == 0
        assert rows["chat-alone"]["agent_tokens"] > 0 and rows["chat-alone"]["cost"] > 0
        assert "chat-alone against heuristic: perplexity " in capsys.readouterr().out
        written = Path("ablate/ablate.json").read_bytes()
        assert main([*flags, *chat, *prices]) == 0
        assert Path("ablate/ablate.json").read_bytes() == written


@pytest.mark.usefixtures("forked")
def test_every_figure_is_told_for_each_named_text(tiny_llama: Path, tmp_path: Path) -> None:
    texts = flag_texts(tmp_path)
    flags = [*SMALL, "--model", str(tiny_llama), "--seeds", "1", "--evaluated-tokens", "800", *texts]
    with at_home(tmp_path):
        assert main([*flags, "--arms", "heuristic,grid"]) == 0
        rows = {row["arm"]: row for row in json.loads(Path("ablate/ablate.json").read_text())["rows"]}
        run = Path("ablate/runs/heuristic-1")
        config, summary = read_run_config(run), read_summary(run)
        table = list(csv.DictReader(Path("ablate/ablate.csv").read_text().splitlines()))
        text = Path("ablate/ablate.md").read_text()
    assert config.text_weights == WEIGHTS and config.text_cut == 1
    assert rows["heuristic"]["texts"] == {part["name"]: part["pruned"] for part in summary["texts"]}
    for arm, row in rows.items():
        code, prose = row["texts"]["code"], row["texts"]["prose"]
        assert code != prose and row["perplexity"] == pytest.approx(
            math.exp(0.75 * math.log(code) + 0.25 * math.log(prose))
        )
        assert f"| {arm} | {code:.2f} | {prose:.2f} |" in text
        assert f"| {arm} | 1 | {row['perplexity']:.2f} | {code:.2f} | {prose:.2f} | " in text
    assert [float(row["perplexity code"]) for row in table] == [row["texts"]["code"] for row in rows.values()]


@pytest.mark.usefixtures("forked")
def test_a_goal_is_read_by_chat_models_and_all_arms_are_judged_by_its_figures(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = {"aims": [{"name": "code", "weight": 4}, {"name": "prose", "weight": 1}]}
    named = [part for part in flag_texts(tmp_path) if "weights" not in part and part != "code=3,prose=1"]
    flags = [*SMALL, "--model", str(tiny_llama), "--seeds", "0", "--evaluated-tokens", "800", *named]
    goal = ["--goal", "Code must stay.", "--judge", "code=9,prose=1", "--arms", "chat-alone,heuristic,told,kappa"]

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return brief if "The goal:\n<data goal>" in body["messages"][1]["content"] else PLANS[0]

    with at_home(tmp_path), OpenAIServer(answer) as server:
        assert main([*flags, *goal, "--planner", server.planner("fine")]) == 0
        found = json.loads(Path("ablate/ablate.json").read_text())
        rows, runs = {row["arm"]: row for row in found["rows"]}, Path("ablate/runs")
        configs = {arm: read_run_config(runs / f"{arm}-0") for arm in ("chat-alone", "heuristic", "told")}
        dense = {part["name"]: part["dense"] for part in read_summary(runs / "told-0")["texts"]}
        text = Path("ablate/ablate.md").read_text()
    assert [configs[arm].goal for arm in configs] == ["Code must stay.", "", ""]
    assert configs["told"].text_weights == {"code": 9, "prose": 1} and not configs["heuristic"].text_weights
    assert list(rows) == ["chat-alone", "heuristic", "told", "kappa"]
    for row in rows.values():
        code, prose = row["texts"]["code"], row["texts"]["prose"]
        assert row["perplexity"] == pytest.approx(math.exp(0.9 * math.log(code) + 0.1 * math.log(prose)))
        assert row["kl"] == pytest.approx(0.9 * row["kls"]["code"] + 0.1 * row["kls"]["prose"])
    judged = math.exp(0.9 * math.log(dense["code"]) + 0.1 * math.log(dense["prose"]))
    assert found["dense"] == {"0": pytest.approx(judged)}, "of the workbench and of runs of the graph alike"
    assert re.search(r" tokens of `90% code \S+ \+ 10% prose \S+` \(test text, ", text)
    told = "Perplexity and KL count 90% code and 10% prose in all rows; no arm was told so but told."
    assert f"were given a goal: 'Code must stay.'. {told}" in text
    said = capsys.readouterr().out
    assert "heuristic against told: perplexity" in said and "chat-alone against told: perplexity" in said


def test_a_goal_stands_among_the_options_of_the_ablation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with at_home(tmp_path):
        assert main([*flag_texts(tmp_path), "--arms", "heuristic", "--", "--goal", "Code must stay."]) == 2
        assert main([*flag_texts(tmp_path), "--arms", "heuristic", "--goal", "Code must stay."]) == 2
        for flags in (["--max-evaluated-tokens", "0"], ["--tau=9", "--target-sparsity=0.3"]):
            assert main(["--arms", "heuristic", "--", *flags]) == 2
    assert capsys.readouterr().err == (
        "error: give --goal before the lone --, and --judge: what the goal's texts count for every arm's row\n"
        "error: a goal needs a judge: words for those who read, and figures to judge all by\n"
        "error: --max-evaluated-tokens holds for every arm; give what is meant by it before the lone --\n"
        "error: --target-sparsity holds for every arm; give what is meant by it before the lone --\n"
    )
