"""`python -m tools.compare` as a person runs it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from graph.config import RunConfig
from tests.end_to_end.helpers import TINY, Outcome, at_home, let_go
from tools import compare
from tools.plans.jobs import ALL_ALLOCATIONS, ALL_METHODS
from tools.workbench.evaluate import Evaluator

Command = Callable[..., Outcome]

FLAGS = (*TINY[: TINY.index("--patience")], "--evolution-tokens", "5000")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command in this process, in `tmp_path`."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = compare.main(list(arguments))
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    with at_home(tmp_path):
        yield run


def read_rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "compare.json").read_text(encoding="utf-8"))["rows"]
    return rows


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what differs whenever it is measured."""
    measured_anew = {"seconds", "allocation_seconds", "peak_memory_bytes"}
    return [{name: value for name, value in row.items() if name not in measured_anew} for row in rows]


def test_interrupted_and_gone_on_with_by_the_same_command(
    tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.model_validate({"model": str(tiny_llama), "calibration_windows": 4, "gradient_windows": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump() | {"window": 64}))
    flags = ("--config", "run.yaml", *FLAGS, "--recipes", "wanda:uniform,refit:kappa", "--sparsity", "0.5,2:4")
    evaluate, calls = Evaluator.evaluate, 0

    def interrupt(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", interrupt)
        stopped = command(*flags)
    sentence = "stopped; the rows that are done are kept, and the same command goes on\n"
    assert (stopped.code, stopped.err) == (1, sentence)
    first = read_rows(tmp_path / "compare")
    assert [row["recipe"] for row in first] == ["wanda:uniform"]
    done = command(*flags)
    assert (done.code, done.err) == (0, "")
    rows = read_rows(tmp_path / "compare")
    assert rows[0] == first[0]
    assert [(row["recipe"], row["sparsity"], row["pattern"], row["achieved_sparsity"]) for row in rows] == [
        ("wanda:uniform", 0.5, "", 0.5),
        ("refit:kappa", 0.5, "", 0.5),
        ("wanda:uniform", 0.5, "2:4", 0.5),
        ("refit:uniform", 0.5, "2:4", 0.5),
    ]
    assert {row["protocol"]["tokens"] for row in rows} == {3 * 64}
    lines = done.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        *("dense", "wanda:uniform at 50%", "refit:kappa at 50%", "wanda:uniform at 2:4", "refit:uniform at 2:4"),
        "see compare/compare.md",
    ]
    again = command(*flags)
    assert (again.code, again.out, again.err) == (0, done.out, "")

    refused = command(*flags, "--seed", "7")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "error: compare holds a comparison with other settings (seed); choose another --out\n"


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--recipes", "wanda:nonsense"], "recipe 'wanda:nonsense': there is no allocation 'nonsense'; "),
        (["--recipes", "nonsense:owl", "--dry-run"], "recipe 'nonsense:owl': method: "),
        (["--sparsity", "45"], "sparsity '45' must lie between 0 and 1, such as 0.45"),
        (["--sparsity", "0.97"], "sparsity 0.97 is above the 0.95 of max_layer_sparsity; ask for less, or raise that"),
        *(
            (["--recipes", "refit~0.5cdoe~0.5prose:uniform", *dry], "mix weighs 'cdoe', and this run has neither ")
            for dry in ([], ["--dry-run"])
        ),
        (["--sparcity", "0.45"], "unknown option '--sparcity'; did you mean --sparsity?"),
        (["--out", "file"], "--out file cannot be written: "),
        (["--out", ""], "out: "),
        (["--out", "/proc/nothing"], "--out /proc/nothing cannot be written: "),
        (["--config", "missing.yaml"], "config file missing.yaml does not exist"),
        (["--test", "file:missing.txt", "--dry-run"], "text file missing.txt does not exist"),
        (["--evolution-tokens", "-1"], "evolution_tokens: input should be greater than or equal to 0, not '-1'"),
        (["--evolution", "slow"], "evolution: input should be 'fast' or 'full', not 'slow'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    flags: list[str], sentence: str, tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = command("--model", str(tiny_llama), *FLAGS, *flags)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith(f"error: {sentence}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_artifact_that_is_gone_is_one_line(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    flags = ("--model", str(tiny_llama), *FLAGS, "--recipes")
    assert command(*flags, "magnitude:uniform").code == 0
    for path in (tmp_path / "compare" / "work" / "artifacts").rglob("*.json"):
        path.unlink()
    let_go()  # as a fresh process
    outcome = command(*flags, "wanda:uniform")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith("error: artifact ")
    assert outcome.err.endswith(" is missing; begin again with another --out\n")
    assert len(read_rows(tmp_path / "compare")) == 1


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_dry_run_counts_the_rows_from_the_models_config_alone(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    outcome = command(
        "--dry-run", "--model", str(tiny_llama / "config.json"), "--recipes", "all", "--sparsity", "0.5,2:4"
    )
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert any(line.startswith("prunable: 14 layers, 15,360 weights, ") for line in lines)
    assert lines[0].startswith("fits: needs ") and any(line.startswith("time: about ") for line in lines)
    assert lines[-1] == (
        f"not counted: the searches of {len(ALL_METHODS)} rows, each of up to 9,830,400 tokens through models pruned "
        "for it (400 generations of 16 children, of which are kept 1 by 512 tokens, 1 by 8,192 tokens)"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_plot")
def test_every_method_with_every_allocation(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("--model", str(tiny_llama), *FLAGS, "--recipes", "all", "--sparsity", "0.45")
    assert (outcome.code, outcome.err) == (0, "")
    rows = read_rows(tmp_path / "compare")
    assert {row["recipe"].replace("~dense:evolution", ":evolution") for row in rows} == {
        f"{method}:{allocation}" for method in ALL_METHODS for allocation in ALL_ALLOCATIONS
    }
    assert len(rows) == len(ALL_METHODS) * len(ALL_ALLOCATIONS)
    assert {row["achieved_sparsity"] for row in rows} == {round(0.45 * 15_360) / 15_360}
