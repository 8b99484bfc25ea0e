"""Where a model came from that a run cut."""

from pathlib import Path

from tools.base.made import read_result
from tools.results.schema import Origin, Protocol, Summary


def find_origin(model: str, protocol: Protocol) -> Origin | None:
    """The run whose cut is in the directory `model`; None where it holds anything else. Raises BrokenSeal.

    `protocol` is that of perplexities which the one before the cut is told beside.
    """
    directory = Path(model).parent
    found = read_result(directory) if Path(model).name == "model" else None
    if not found or not found.get("cut"):
        return None
    summary = Summary.model_validate(found)
    assert summary.cut is not None, "as was looked at"
    return Origin(
        run=summary.run,
        model=summary.model,
        cut=summary.cut,
        perplexity=summary.perplexity.dense if summary.protocol == protocol else None,
    )
