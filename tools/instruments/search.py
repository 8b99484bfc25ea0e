"""Factors on groups of layers, searched for by measured KL: one plan probed again and again, and the table of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.base.errors import ImpossiblePlan, UserError
from tools.instruments.comparisons import Figures, round_figure
from tools.instruments.functions import Draft, Round, count_windows, probe, read_probed, take_part
from tools.measure.losses import Evaluation, compare_kl
from tools.plans.recipe import LEAST_FACTOR, MOST_FACTOR, Adjustment

MOST_SEARCHED = 6
"""Groups of layers whose factors one call searches for."""

STEPS = (2.0, 1.4, 1.2)
"""By how much a factor is raised or lowered; the next once no group gains by the one before."""

Factors = dict[str, float]
"""By selector."""


def search(round_: Round, draft: Draft, selectors: Sequence[str], tokens: int) -> Figures:
    """The factors on the KL curves of groups by which a plan measures least, as far as so many tokens through the
    model go, those of its statistics and curves among them: a pattern search (Hooke and Jeeves, J. ACM 8(2), 1961, its
    exploratory moves) from the plan as it is.

    Each group's factor in turn is raised, or else lowered, by one of `STEPS`, at the same budget, and the plan probed
    on half of the validation windows; what lies below the best so far by more than one standard error, paired, is gone
    on from. A row for each: its factors, KL, KL minus the plan's as it was and the standard
    error of that. Each counts as a probe of the plan with these factors, and takes no tokens where it is known. It
    ends, too, before a probe that there are not the tokens or seconds for. Raises ImpossiblePlan where the plan itself
    cannot be, is a graft, or where a group can be given no factor, and ValueError where there are not the tokens or
    seconds for a probe of it.
    """
    if draft.graft:
        raise ImpossiblePlan("a graft has no factors to search for; give a plan that prunes")
    names = list(dict.fromkeys(selectors))
    windows = count_windows(round_.bench, None, whole=False)
    takes = round_.count_tokens(draft, windows * round_.bench.settings.window)
    if tokens < takes:
        raise ValueError(f"{tokens:,} tokens are less than one probe of {takes:,}; give it more")
    for name in names:
        _refuse_idle(round_, draft, name)
    climb = _Climb(round_, draft, windows, tokens)
    climb.try_out({})
    for step in STEPS:
        while climb.sweep(names, step):
            pass
    return climb.tell()


def _refuse_idle(round_: Round, draft: Draft, name: str) -> None:
    """Raises ImpossiblePlan where no factor on a group makes a plan that can be, before anything is probed."""
    problems = []
    for factor in (STEPS[0], 1 / STEPS[0]):
        try:
            round_.resolve(_adjust(draft, {name: factor}))
        except ImpossiblePlan as error:
            problems.append(error)
    if len(problems) > 1:
        raise problems[0]


class _Climb:
    """A search under way."""

    def __init__(self, round_: Round, draft: Draft, windows: int, left: int) -> None:
        self._round, self._draft, self._windows, self._left = round_, draft, windows, left
        self._each = windows * round_.bench.settings.window
        self._best: Factors = {}
        self._found: dict[str, tuple[Factors, Figures]] = {}
        self._losses: dict[str, Evaluation] = {}
        self._ended = ""

    def sweep(self, names: Sequence[str], step: float) -> bool:
        """Move each factor once, as long as there are tokens; whether anything was gained."""
        before = dict(self._best)
        for name in names:
            now = self._best.get(name, 1.0)
            for factor in (now * step, now / step):
                if not self._ended and LEAST_FACTOR <= factor <= MOST_FACTOR and self._gains({name: factor}):
                    break
        return self._best != before and not self._ended

    def _gains(self, changed: Factors) -> bool:
        """Try the best factors with these in place of theirs; whether that is better, and the best from now on."""
        rounded = {name: round(factor, 4) for name, factor in (self._best | changed).items()}
        factors = {name: factor for name, factor in rounded.items() if factor != 1}
        if _key(factors) in self._found or not self.try_out(factors):
            return False
        ours, theirs = self._losses.get(_key(factors)), self._losses.get(_key(self._best))
        if ours is None or theirs is None:
            return False
        change, error = compare_kl(ours, theirs)
        if change >= -error:
            return False
        self._best = factors
        return True

    def try_out(self, factors: Factors) -> bool:
        """Probe the plan with these factors; False where that cannot be, or there is nothing left for it."""
        adjusted = _adjust(self._draft, factors)
        try:
            takes = self._round.count_tokens(adjusted, self._each)
            if takes > self._left:
                raise ValueError(f"{self._left:,} of its tokens are left, and a probe takes {takes:,}")
            (figures,) = probe(self._round, [adjusted])
        except UserError:  # a full disk, say
            raise
        except ImpossiblePlan as error:
            if not factors:
                raise
            self._found[_key(factors)] = (factors, {"error": str(error)})
            return False
        except ValueError as error:  # too few tokens or seconds beside the trial
            if not factors:
                raise
            self._ended = str(error)
            return False
        self._left -= takes
        self._found[_key(factors)] = (factors, figures)
        probed = read_probed(self._round, figures["probe"])
        losses = take_part(self._round.bench, probed, self._windows)  # of an earlier probe there may be more
        if losses.finite:
            self._losses[_key(factors)] = losses
        elif not factors:
            raise ImpossiblePlan("the plan's own loss is not finite; search from another")
        return True

    def tell(self) -> Figures:
        """The table, and the plan's adjustments at its best."""
        rows = [self._describe(factors, figures) for factors, figures in self._found.values()]
        told: dict[str, Any] = {
            "tokens": self._each,
            "columns": "factors, KL, KL minus the plan's as it was, error, number of the probe",
            "rows": rows,
            "best": self._best,
            "adjustments": [x.model_dump(exclude_none=True) for x in _adjust(self._draft, self._best).adjustments],
        }
        return told | ({"ended": self._ended} if self._ended else {})

    def _describe(self, factors: Mapping[str, float], figures: Figures) -> list[Any]:
        if "error" in figures:
            return [factors, figures["error"]]
        ours, start = self._losses.get(_key(factors)), self._losses[_key({})]
        change: tuple[float | None, float | None] = compare_kl(ours, start) if ours else (None, None)
        return [factors, figures["kl"], *map(round_figure, change), figures["probe"]]


def _key(factors: Mapping[str, float]) -> str:
    return str(sorted(factors.items()))


def _adjust(draft: Draft, factors: Mapping[str, float]) -> Draft:
    more = [Adjustment(selector=name, action="factor", factor=factor) for name, factor in factors.items()]
    return draft.model_copy(update={"adjustments": [*draft.adjustments, *more]})
