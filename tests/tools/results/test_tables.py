"""report.md and the tables in it, to the letter."""

import re
from pathlib import Path

from tests.made_runs import CUT, end_run, make_layers, write_run
from tools.base.rundir import scan_events
from tools.results.schema import Knowledge, Reach, Score, Summary, TextResult
from tools.results.tables import list_table, list_texts, write_report


def read_report(run: Path, stop: str = "it was done") -> list[str]:
    """The lines of a made run's report.md."""
    summary = Summary.model_validate_json((run / "summary.json").read_bytes())
    trials = [event for _, event in scan_events(run, "trial")]
    sparsity = {layer.name: 0.45 for layer in make_layers()}
    return write_report(summary, trials, sparsity, stop).splitlines()


def test_a_report_to_the_letter(tmp_path: Path) -> None:
    lines = read_report(write_run(tmp_path / "demo", words="a|b"))
    assert lines[:11] == [
        "# demo: tiny at 45.00% sparsity",
        "",
        "45.00% of the 8,000 prunable weights are zero (target 45.00%), 36.00% of the whole model, after 2 iterations "
        "with 1 rollback. Test perplexity is 22.00; dense 20.00, uniform Wanda at the same sparsity (each block behind "
        "its pruned predecessors) 25.00, so the degradation is 0.40 times uniform "
        "Wanda's.",
        "",
        "The loop ended because it was done.",
        "",
        "| | perplexity on test |",
        "|---|---|",
        "| dense | 20.00 |",
        "| **Billhook** | **22.00** |",
        "| uniform Wanda, same sparsity, each block behind its pruned predecessors | 25.00 |",
    ]
    row = "| 2 | 45.00% | 30.00 | 0.4000 ± 0.0100 | 0.0800 | rollback | 45.0% refit:kappa | because a\\|b |"
    assert row in lines and "| model.layers.0.self\\_attn.q\\_proj | 45.00% |" in lines
    assert f"- 301 s, peak memory 1.50 GB, mask_sha256 `{'ab' * 32}`" in lines


def test_a_report_of_a_model_of_which_little_can_be_pruned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    end_run(run, reach=Reach(of_blocks=0.03, of_model=0.025, prunable=12_345))
    lines = read_report(run)
    assert lines[0] == "# demo: tiny pruned to 45.00% of the 3.0% of its blocks' weights that are prunable"
    assert lines[2].endswith(
        " times uniform Wanda's. Only 3.0% of the weights in the blocks are prunable, 2.5% of the whole model; all "
        "others are dense."
    )
    end_run(run, reach=Reach(of_blocks=0.995, of_model=0.5, prunable=12_345))  # large embeddings are nobody's fault
    lines = read_report(run)
    assert lines[0] == "# demo: tiny at 45.00% sparsity" and lines[2].endswith(" times uniform Wanda's.")
    assert lines[2].startswith("45.00% of the 12,345 prunable weights are zero (target 45.00%), 22.50% of the ")


def test_a_report_of_a_cut_tells_no_zeros(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    end_run(run, asked="size", cut=CUT)
    lines = read_report(run)
    assert lines[0] == "# demo: tiny cut to 81% of its bytes"
    assert "## Gone of each layer" in lines and "| layer | share |" in lines
    end_run(run, asked="size", cut=None, achieved_sparsity=0.0)
    lines = read_report(run)
    assert lines[0] == "# demo: tiny not cut" and "## Gone of each layer" in lines


def test_what_was_asked_has_its_tables(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    knowledge = Knowledge(
        source="file:q.jsonl", pairs=9, dense=-2.5, pruned=None, uniform_wanda=-3, retention=0.5, retention_error=0.1
    )
    scores = [
        Score(model=model, task="mmlu", metric="acc", value=v, error=0.01, samples=1000, protocol={"task": "mmlu"})
        for model, v in (("dense", 0.5), ("pruned", None))
    ]
    end_run(run, knowledge=knowledge, benchmarks=scores)
    lines = read_report(run)
    assert "Answer probability kept: 50.0%." in lines[2]
    counted = knowledge.model_copy(update={"dense_right": 3, "pruned_right": 2})
    end_run(run, knowledge=counted)
    told = read_report(run)
    assert "Answer probability kept: 50.0%, exact match 2 beside the dense model's 3 of 9." in told[2]
    assert any(line.endswith("Exact match: 2 right, 3 by the dense model.") for line in told)
    assert "| dense | -2.500 |" in lines and "| **Billhook** | not finite |" in lines
    at = lines.index("| task | metric | dense | pruned | questions |")
    assert lines[at + 1 : at + 5] == [
        *("|---|---|---:|---:|---:|", "| mmlu | acc | 0.5000 ± 0.0100 | not finite | 1000 |", "", "- task mmlu"),
    ]


def test_words_of_models_keep_to_their_cells(tmp_path: Path) -> None:
    """Prompts of a text that the model wrote, and a reflector's reason: data, whatever it looks like."""
    source = "self:Tell ` <img src=x> | Write | Say"
    figures = {"dense": 2.0, "pruned": 3.0, "uniform_wanda": 4.0, "kl": 0.5, "kl_error": 0.1}
    text = TextResult.model_validate({"name": "tales", "source": source, "weight": 1, **figures})
    row = list_texts([text])[-2]
    assert len(re.split(r"(?<!\\)\|", row)) == 9, "seven cells"
    assert not re.search(r"(?<!\\)[<>`]", row) and r"Tell \` \<img src=x\> \| Write" in row
    lines = read_report(write_run(tmp_path / "demo"), stop="the reflector stops: ![x](http://h/p.png)")
    assert r"The loop ended because the reflector stops: !\[x\](http://h/p.png)." in lines


def test_columns_stand_to_the_left_or_the_right() -> None:
    assert list_table(("", "a"), [("b", "1")], left=1) == ["|  | a |", "|---|---:|", "| b | 1 |"]
