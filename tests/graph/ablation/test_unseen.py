"""Texts that rows are judged by and no arm is given."""

from pathlib import Path

import pytest
from rich.console import Console

from graph.ablation.experiment import ablate
from graph.ablation.rows import measure_checkpoint, measure_exported
from graph.ablation.settings import AblateSettings
from tests.benches import ignore, prune
from tests.named import write_texts
from tests.rows import prose, write_rows
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.measure import losses
from tools.models.save import export_model
from tools.workbench.open import use_workbench
from tools.workbench.store import DENSE


def make_settings(model: Path, directory: Path, **changes: object) -> AblateSettings:
    unseen = {"sql": write_rows(directory / "sql.jsonl", [{"text": prose(20_000, 2500).upper()}])}
    goal = {"goal": "SQL must stay.", "judge": {"code": 0, "prose": 1, "sql": 3}, "unseen": unseen}
    asked = {"arms": "kappa", "seeds": "0", "evaluated_tokens": 2000, "out": str(directory / "out")}
    tiny = tiny_settings(model, text=write_texts(directory)).model_dump()
    return AblateSettings.model_validate(tiny | goal | asked | changes)


@pytest.mark.parametrize("device", ["cpu", "stream"])
def test_what_a_run_left_is_measured_as_what_is_in_the_workbench(
    device: str, tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "stream":  # all windows pass a block before any passes the next
        monkeypatch.setattr(losses, "evaluate_windows", None)
    settings = make_settings(tiny_llama, tmp_path, device=device)
    with use_workbench(settings, tmp_path / "run", lambda _: None, ignore) as bench:
        checkpoint = prune(bench, bench.profile(ignore), 0.45)
        same, pruned = (measure_checkpoint(settings, bench, x, ignore) for x in (DENSE, checkpoint))
        export_model(bench.model, bench.tokenizer, tmp_path / "model", "")
    assert measure_exported(settings, tmp_path / "model", ignore) == pruned
    assert same.kls == {"sql": 0.0} and same.pruned == same.dense == pruned.dense
    assert pruned.kls["sql"] and pruned.pruned != pruned.dense


def test_rows_are_judged_by_texts_that_no_arm_is_given(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    [row] = (known := ablate(make_settings(tiny_llama, tmp_path), [], Console(quiet=True))).rows
    assert list(row.texts) == list(row.kls) == ["code", "prose", "sql"]
    assert row.kl == pytest.approx((row.kls["prose"] + 3 * row.kls["sql"]) / 4)  # type: ignore[operator]
    assert row.perplexity == pytest.approx((row.texts["prose"] * row.texts["sql"] ** 3) ** 0.25)  # type: ignore[operator]
    assert known.dense[0] and known.dense[0] != row.perplexity
    text = (tmp_path / "out" / "ablate.md").read_text()
    windows = tiny_settings(tiny_llama).test_windows
    assert f"Perplexity on {2 * 64 * windows:,} tokens of `" in text, "of prose, and as many of sql"
    assert "Perplexity and KL count 0% code and 25% prose and 75% sql in all rows;" in text
    assert "No arm was given sql." in text and "| arm | code | prose | sql |" in text


def test_unseen_texts_that_are_too_short_are_refused_before_anything_is_pruned(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    short = write_rows(tmp_path / "short.jsonl", [{"text": prose(0, 50)}])
    with pytest.raises(UserError, match=r"^seed 0: text source 'file:.*short\.jsonl' is too short"):
        ablate(make_settings(tiny_llama, tmp_path, unseen={"sql": short}), [], Console(quiet=True))
    assert not (tmp_path / "out" / "seed-0").exists()
