"""Where a model came from that a run cut."""

from pathlib import Path

from tools.results.page.record import read_summary
from tools.results.schema import Origin, Protocol


def find_origin(model: str, protocol: Protocol) -> Origin | None:
    """The run whose cut is in the directory `model`; None where it holds anything else. Raises BrokenSeal,
    UserError.

    `protocol` is that of perplexities which the one before the cut is told beside.
    """
    directory = Path(model).parent
    summary = read_summary(directory) if Path(model).name == "model" else None
    if summary is None or summary.cut is None:
        return None
    return Origin(
        run=summary.run,
        model=summary.model,
        cut=summary.cut,
        perplexity=summary.perplexity.dense if summary.protocol == protocol else None,
    )
