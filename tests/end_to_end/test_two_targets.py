"""A cut, and zeros in what stays: two runs by one command, stopped, resumed and repeated as one."""

from pathlib import Path

import pytest
import transformers

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    pick_prunable,
    read_summary,
    read_trials,
    read_weights,
    run_apart,
    run_here,
)
from tools.base.options import read_yaml

BOTH = ("--target-size", "0.75", "--target-sparsity", "0.4", "--tau", "9", "--max-iterations", "2")


@pytest.fixture(scope="module")
def given(tiny_llama: Path) -> list[str]:
    return ["--name", "run", "--model", str(tiny_llama), *TINY, *BOTH]


@pytest.fixture(scope="module")
def easy(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs directory of two runs that nothing happened to."""
    return run_apart(tmp_path_factory.mktemp("both"), *given).parent


def test_zeros_are_set_in_the_smaller_model(easy: Path, tiny_llama: Path) -> None:
    first, second = read_summary(easy / "run"), read_summary(easy / "run-zeros")
    assert first["cut"]["size"] == 0.75 and "origin" not in first
    assert second["origin"] == {
        "run": "run",
        "model": str(tiny_llama),
        "cut": first["cut"],
        "perplexity": first["perplexity"]["dense"],
    }
    assert second["status"] == "finished" and second["target_sparsity"] == 0.4 and "cut" not in second
    assert second["perplexity"]["dense"] == pytest.approx(first["perplexity"]["pruned"], rel=1e-6)
    kept = transformers.AutoModelForCausalLM.from_pretrained(easy / "run-zeros" / "model")
    assert kept.config.intermediate_size < transformers.AutoConfig.from_pretrained(tiny_llama).intermediate_size
    pruned = pick_prunable(read_weights(easy / "run-zeros" / "model")).values()
    zeros, weights = sum(int((weight == 0).sum()) for weight in pruned), sum(weight.numel() for weight in pruned)
    assert zeros == round(0.4 * weights)
    card, report = ((easy / "run-zeros" / name).read_text() for name in ("model/README.md", "report.md"))
    before = f"of its bytes before, by run run; test perplexity before that {first['perplexity']['dense']:.2f}"
    assert before in card and before in report
    assert f"# {tiny_llama.name}, cut to " in card and "of its bytes and pruned to 40.00%" in card


@pytest.mark.parametrize(
    "halt",
    [
        Halt("finish", "graph.nodes.finish:export_model", after=True),
        Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5),  # no layer of the first run passes there
    ],
)
def test_killed_in_either_and_resumed_by_the_first_ones_name(
    halt: Halt, given: list[str], easy: Path, tmp_path: Path
) -> None:
    runs = ("--runs-dir", str(tmp_path / "killed"))
    assert fork(tmp_path, *given, *runs, halt=halt).finish().code < 0
    assert (tmp_path / "killed" / "run-zeros").exists() == (halt.node == "prune")
    assert run_here("--resume", "run", "--max-agent-tokens", "77", *runs) == 0
    caps = [read_yaml(tmp_path / "killed" / name / "config.yaml")["max_agent_tokens"] for name in ("run", "run-zeros")]
    assert caps == [77, 77], "the first has spent none of them"
    for name in ("run", "run-zeros"):
        killed = tmp_path / "killed" / name
        assert read_trials(killed) == read_trials(easy / name)
        assert_same_weights(killed, easy / name)


def test_again_nothing_is_left_to_do_and_another_target_is_refused(
    given: list[str], easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ("--runs-dir", str(easy))
    assert run_here("--resume", "run", *runs) == 0
    said = capsys.readouterr().out
    assert "run run is finished" in said and "run run-zeros is finished" in said
    assert run_here("--resume", "run", "--target-sparsity", "0.4", *runs) == 0
    capsys.readouterr()
    assert run_here("--resume", "run", "--target-sparsity", "0.5", *runs) == 2
    assert "run 'run' cannot be resumed with another second target; start a new run" in capsys.readouterr().err
    assert run_here(*given, "--name", "run-zeros", *runs) == 2
    assert "exists already" in capsys.readouterr().err


def test_both_are_replayed_and_shown_live_at_one_address(easy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--replay", "run", "--name", "again", "--serve", "0", "--runs-dir", str(easy)) == 0
    pages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("live page: ")]
    assert len(pages) == 2 and len({*pages}) == 1
    for name, other in (("again", "run"), ("again-zeros", "run-zeros")):
        assert_same_weights(easy / name, easy / other)


def test_the_config_of_the_first_asks_for_no_zeros(easy: Path) -> None:
    again = ("--config", str(easy / "run" / "config.yaml"), "--name", "cut-alone", "--runs-dir", str(easy))
    assert run_here(*again) == 0
    assert_same_weights(easy / "cut-alone", easy / "run")
    assert not (easy / "cut-alone-zeros").exists()


def test_short_of_its_size_no_zeros_are_set(trained_llama: Path, tmp_path: Path, command: Command) -> None:
    short = ("--target-size", "0.6", "--target-sparsity", "0.4", "--tau", "0.000001", "--max-iterations", "1")
    outcome = command("--name", "run", "--model", str(trained_llama), *TINY, *short)
    assert outcome.code == 0 and "run run is short of its target, and no zeros are set" in outcome.out
    assert not (tmp_path / "runs" / "run-zeros").exists()


def test_a_sparsity_that_a_file_has_for_other_runs_is_no_second_target(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "mine.yaml").write_text("target_sparsity: 0.5\n")
    outcome = command("--config", "mine.yaml", "--model", str(tiny_llama), *TINY, "--target-size", "0.8")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "target_size and target_sparsity are two targets of one run: cut first, then set zeros" in outcome.err


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--text-bounds", "a=0.2"), "text_bounds bound 'a', which is none of the texts"),
        (("--pattern", "5:4"), "pattern '5:4' is not N:M"),
        (("--target-sparsity", "1.5"), "target_sparsity: 1.5 looks like a percentage"),
        (("--name", "x" * 98), "-zeros' must be letters, digits, '.', '_' or '-', at most 100 of them"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_cut(
    more: tuple[str, ...], problem: str, given: list[str], tmp_path: Path, command: Command
) -> None:
    outcome = command(*given, *more)
    assert outcome.code == 2 and problem in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "runs" / "run" / "summary.json").exists()
