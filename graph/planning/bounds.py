"""What a person said must stay, whatever a plan gains elsewhere: answers to questions, and texts."""

from collections.abc import Mapping, Sequence
from typing import Literal

from tools.measure.recall import Retention
from tools.results.schema import TextFigures

Verdict = Literal["accept", "rollback"]


def heed_facts(least: float, retention: Retention | None, verdict: Verdict, reason: str) -> tuple[Verdict, str]:
    """The verdict, with the answer probability that a plan must keep: less than the `least` share rolls it back."""
    if verdict == "rollback" or not least:
        return verdict, reason
    if retention is None:
        return "rollback", "the probability of an answer is not finite"
    figures = f"answer probability kept {retention.share:.3f} ± {retention.error:.3f}"
    if retention.share < least:
        return "rollback", f"{figures}, below {least:g}, although {reason}"
    return verdict, f"{reason}; {figures}"


def heed_bounds(
    bounds: Mapping[str, float],
    trial: Sequence[TextFigures],
    dense: Sequence[TextFigures],
    verdict: Verdict,
    reason: str,
) -> tuple[Verdict, str]:
    """The verdict, with how far each bounded text's perplexity may rise above the dense model's, as a fraction."""
    before = {text.name: text.perplexity for text in dense}
    for text in trial if verdict == "accept" else ():
        least = before.get(text.name)
        if text.name not in bounds or not least:
            continue
        if text.perplexity is None:
            return "rollback", f"the loss on {text.name} is not finite"
        rise = text.perplexity / least - 1
        if rise > bounds[text.name]:
            told = f"perplexity on {text.name} {text.perplexity:.2f}, {rise:+.1%} above {least:.2f}"
            return "rollback", f"{told}, where {bounds[text.name]:.3g} is the bound, although {reason}"
    return verdict, reason
