"""What each text counts in the statistics of a plan: in a recipe, and in its label. No torch."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from tools.base.errors import ImpossiblePlan
from tools.base.named import NAME
from tools.base.settings import QUESTIONS, RUN

SHORT = {"quarter": 0.25, "half": 0.5}
"""Mixtures of the run's text and questions that have a name in labels: the share of the questions."""

MARKS = rf"(?:(?:~\d+(?:\.\d+)?{NAME})+|~(?:{'|'.join(SHORT)}))"
"""The form of a mixture in a label, such as `~0.7code~0.3prose` or `~quarter`."""

DIGITS = 4
"""Behind the point, of a share."""


def read_mix(value: Any) -> Any:
    """Names with their shares, by name and in sum 1, from a mapping or such pairs; nothing where no text counts.

    Shares have few digits, so that a label says them all. Raises ValueError for one that is no number from 0 up.
    """
    if value is None:
        return ()
    try:
        pairs = dict(value) if isinstance(value, Mapping | list | tuple) else value
    except TypeError as error:
        raise ValueError("a mix is of texts by name, each with its weight") from error
    if not isinstance(pairs, dict):
        return pairs
    weights = {str(name): _read_weight(name, weight) for name, weight in sorted(pairs.items())}
    total = sum(weights.values())
    if not total:
        return ()
    if abs(total - 1) > 10**-DIGITS * len(weights):
        weights = {name: weight / total for name, weight in weights.items()}
    shares = {name: round(weight, DIGITS) for name, weight in weights.items()}
    return tuple((name, share) for name, share in shares.items() if share)


def _read_weight(name: Any, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the weight of {name!r} is no number") from error
    if not 0 <= number < math.inf or re.fullmatch(NAME, str(name)) is None:
        raise ValueError(f"{name!r} with weight {number:g} is no text with a weight of 0 or more")
    return number


Mix = Annotated[tuple[tuple[str, float], ...], BeforeValidator(read_mix), PlainSerializer(dict, return_type=dict)]
"""Shares by name; read and written as a mapping."""


def mix_questions(share: float) -> Mix:
    """So much of questions beside the run's own text."""
    mix: Mix = read_mix({RUN: 1 - share, QUESTIONS: share})
    return mix


def label_mix(mix: Mix) -> str:
    """Such as `~0.7code~0.3prose`, or `~quarter`; nothing without a mixture."""
    named = [name for name, share in SHORT.items() if mix == mix_questions(share)]
    return f"~{named[0]}" if named else "".join(f"~{share:g}{name}" for name, share in mix)


def parse_mix(marks: str | None) -> dict[str, float]:
    """What `label_mix` gave. Raises ValueError for a name that stands there twice."""
    if marks and (share := SHORT.get(marks[1:])):
        return dict(mix_questions(share))
    found = re.findall(rf"~(\d+(?:\.\d+)?)({NAME})", marks or "")
    mix = {name: float(share) for share, name in found}
    if len(mix) < len(found):
        raise ValueError(f"a text stands in {marks!r} twice")
    return mix


def refuse_unknown(mix: Mix, texts: Sequence[str]) -> None:
    """Raises ImpossiblePlan where a mixture weighs what is none of the texts."""
    if not (unknown := [name for name, _ in mix if name not in texts]):
        return
    raise ImpossiblePlan(
        f"mix weighs {unknown[0]!r}, which is none of the texts {', '.join(texts)}"
        if texts
        else f"mix weighs {unknown[0]!r}, and this run has neither named texts nor questions; leave it out"
    )
