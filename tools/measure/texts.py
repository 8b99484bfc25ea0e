"""Losses told for each of the named texts; nothing is measured here."""

from tools.results.losses import Evaluation, compare_kl
from tools.results.schema import TextFigures


def list_texts(evaluation: Evaluation, accepted: Evaluation | None = None) -> list[TextFigures]:
    """The figures of every text, with how its KL differs from that of the `accepted` weights on the same windows.

    Empty where texts have no names.
    """
    return [_describe(evaluation, accepted, name) for name in dict.fromkeys(evaluation.texts)]


def _describe(evaluation: Evaluation, accepted: Evaluation | None, name: str) -> TextFigures:
    own, theirs = evaluation.take_text(name), accepted.take_text(name) if accepted else None
    change, error = compare_kl(own, theirs) if theirs and own.finite and theirs.finite else (None, None)
    return TextFigures(
        name=name,
        weight=evaluation.weights[name],
        perplexity=own.perplexity,
        kl=own.mean_kl,
        kl_error=own.kl_error,
        change=change,
        change_error=error,
    )
