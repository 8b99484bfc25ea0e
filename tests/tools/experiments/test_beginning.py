"""Tables of a model whose tokenizer begins a text with a token."""

from pathlib import Path

import pytest

from tests.comparisons import make_settings, run_comparison
from tools.base.errors import UserError

BEFORE = "in windows of 64, a beginning-of-sequence token before every window (not counted), fp32; dense: "


def test_a_table_of_other_windows_is_refused(
    beginning_llama: Path, tmp_path: Path, no_plot: None, workbench_closed: None
) -> None:
    settings = make_settings(beginning_llama, tmp_path / "out", recipes="wanda:uniform,structured:flap")
    begun, _ = run_comparison(settings)
    assert [row.protocol.bos for row in begun.rows] == [True, True]
    assert BEFORE in (tmp_path / "out" / "compare.md").read_text()
    with pytest.raises(UserError, match=r"holds a comparison with other settings \(bos\); choose another --out$"):
        run_comparison(settings.model_copy(update={"bos": "never"}))
