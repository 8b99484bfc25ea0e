"""Where a model came from that a run, or one before it, cut."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.base.rundir import read_config_values
from tools.base.settings import SPLITS
from tools.results.page.record import read_summary
from tools.results.schema import Origin, Protocol, Summary

CUT_BY = (
    *(*SPLITS, "text", "text_cut", "text_spread", "window", "calibration_mix"),
    *(f"{split}_windows" for split in SPLITS),
)
"""Settings by which text is cut into windows: those of the test text lie behind, and between, those of the others."""


def find_origin(model: str, protocol: Protocol, config: Mapping[str, Any]) -> Origin | None:
    """The last run that cut what is in the directory `model`; None where none did. Raises UserError.

    Where that run went on from a cut of an earlier one, the model is that one's, and so on. A run that cut nothing
    itself, of a model that was cut before, passes on what it knows of that. `protocol` is that of perplexities which
    the one before the cut is told beside, and `config` what the run of these was begun with.
    """
    directory = Path(model).parent
    summary = read_summary(directory) if Path(model).name == "model" else None
    found = _trace(summary) if summary else None
    if summary is None or found is None:
        return None
    before, now = (read_config_values(directory), config)
    alike = summary.protocol == protocol and all(before.get(name) == now.get(name) for name in CUT_BY)
    return found if alike else found.model_copy(update={"perplexity": None})


def _trace(summary: Summary) -> Origin | None:
    """What a run hands on of where its model came from."""
    earlier = summary.origin
    if summary.cut is None:
        return earlier
    return Origin(
        run=summary.run,
        model=earlier.model if earlier else summary.model,
        cut=summary.cut,
        left=earlier.share if earlier else 1.0,
        perplexity=earlier.perplexity if earlier else summary.perplexity.dense,
    )
