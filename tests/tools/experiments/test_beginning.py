"""Tables of a model whose tokenizer begins a text with a token, and such tables of an earlier version."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.comparisons import make_settings, run_comparison
from tools.base.errors import UserError
from tools.experiments.comparison import CompareSettings
from tools.workbench.open import close_workbench

BEFORE = "in windows of 64, a beginning-of-sequence token before every window (not counted), fp32; dense: "


def settle(model: Path, out: Path, **changes: Any) -> CompareSettings:
    """Settings in which `bos` is named only among the changes."""
    named = make_settings(model, out, recipes="wanda:uniform,structured:flap").model_dump(exclude={"bos"})
    return CompareSettings.model_validate(named | changes)


def test_a_table_of_an_earlier_version_goes_on_without_it(
    beginning_llama: Path, tmp_path: Path, no_plot: None, workbench_closed: None
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    begun, _ = run_comparison(settle(beginning_llama, new))
    assert [row.protocol.bos for row in begun.rows] == [True, True] and BEFORE in (new / "compare.md").read_text()
    close_workbench()

    never, _ = run_comparison(settle(beginning_llama, old, bos="never"))
    assert never.dense_perplexity != begun.dense_perplexity
    values = json.loads((old / "compare.json").read_text())
    del values["settings"]["bos"], values["bos"], values["rows"][1], values["seal"]
    for row in values["rows"]:
        del row["protocol"]["bos"]
    (old / "compare.json").write_text(json.dumps(values))
    again, lines = run_comparison(settle(beginning_llama, old))
    assert len([line for line in lines if " at 45%: " in line]) == 2
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in never.rows]
    assert [row.protocol.bos for row in again.rows] == [False, False] and again.settings["bos"] == "never"
    assert "in windows of 64, fp32; dense: " in (old / "compare.md").read_text()
    with pytest.raises(UserError, match=r"holds a comparison with other settings \(bos\); choose another --out$"):
        run_comparison(settle(beginning_llama, old, bos="auto"))
