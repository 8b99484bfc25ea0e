"""The table of architectures says what happens."""

from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures import DOZEN, PAGE, read_rows, try_architecture, write_rows

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
ROWS = {row.name: row for row in read_rows(PAGE_TEXT)}
of_this_transformers = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE_TEXT, reason="the table was made with other transformers"
)


@of_this_transformers
def test_the_table_has_every_decoder_and_none_that_ends_in_a_raw_error() -> None:
    assert sorted(ROWS) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert [row.name for row in ROWS.values() if row.result.startswith("raw")] == []
    assert write_rows(PAGE_TEXT, []) == PAGE_TEXT


@of_this_transformers
@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_a_dozen_do_what_the_table_says(name: str, tmp_path: Path) -> None:
    assert try_architecture(name, tmp_path) == ROWS[name]
