"""Factors on groups of layers and numbers of a recipe, searched for by measured KL: one plan probed again and again,
and the table of it."""

from collections.abc import Sequence
from typing import Any

from tools.base.errors import ImpossiblePlan, UserError
from tools.instruments.comparisons import Figures, round_figure
from tools.instruments.functions import Draft, Round, count_windows, probe, read_probed
from tools.instruments.moves import LeverName, Point, go_to, move, refuse_idle_lever
from tools.results.losses import Evaluation, compare_kl, find_likelihood_better

MOST_SEARCHED = 6
"""Groups of layers whose factors one call searches for."""

STEPS = (2.0, 1.4, 1.2)
"""How many times a factor or a lever is raised or lowered; the next once none gains by the one before."""

MOST_ROWS = 30
"""Probes that an answer tells of: the first, the best and the latest; a planner reads some 6,000 characters."""

HOPELESS = 0.1
"""Less likely than this to be better, on a half of the windows, a point is not measured on the others."""


def search(
    round_: Round, draft: Draft, selectors: Sequence[str], tokens: int, levers: Sequence[LeverName] = ()
) -> Figures:
    """The factors on the KL curves of groups, and the values of levers of the recipe, by which a plan measures least,
    as far as so many tokens through the model go, those of its statistics and curves among them: a pattern search
    (Hooke and Jeeves, J. ACM 8(2), 1961, its exploratory moves) from the plan as it is.

    Each in turn is raised, or else lowered, by one of `STEPS`, at the same budget, and the plan probed on half of the
    validation windows, or on half of these where that shows it to be no better (`HOPELESS`); what lies below the best
    so far by more than one standard error, paired, is gone on from. A row for each: what differs from the plan, KL,
    KL minus the plan's as it was on the same windows and the standard error of that. Each counts as a probe of such a
    plan, and takes no tokens where it is known. It ends, too, before a probe that there are not the tokens or seconds
    for. Raises ImpossiblePlan where the plan itself cannot be, is a graft, or where a group can be given no factor or
    a lever changes nothing, and ValueError where there are not the tokens or seconds for a probe of it, or nothing to
    search over.
    """
    if draft.graft:
        raise ImpossiblePlan("a graft has no factors to search for; give a plan that prunes")
    if draft.alone and (selectors or "strength" in levers):
        raise ValueError(
            "with alone, factors and strength move zeros out of the layers that are measured into others, which stay "
            "dense: search without alone, or over levers that move none"
        )
    if not selectors and not levers:
        raise ValueError("nothing to search over; give selectors of groups, or levers")
    names = list(dict.fromkeys([*selectors, *levers]))
    windows = count_windows(round_.bench, None, whole=False)
    text = windows * round_.bench.settings.window
    takes = round_.count_tokens(draft, text)
    if tokens < takes:
        raise ValueError(f"{tokens:,} tokens are less than one probe of {takes:,}; give it more")
    for lever in levers:
        refuse_idle_lever(draft, lever)
    round_.admit([draft], text, 0)
    for name in selectors:
        _refuse_idle(round_, draft, name)  # which measures the curves that all of them are by
    paid = takes - round_.count_tokens(draft, text)
    climb = _Climb(round_, draft, windows, tokens - paid)
    climb.try_out({})
    for step in STEPS:
        while climb.sweep(names, step):
            pass
    return climb.tell()


def _refuse_idle(round_: Round, draft: Draft, name: str) -> None:
    """Raises ImpossiblePlan where no factor on a group makes another plan that can be, before anything is probed."""
    own, problems, moved = round_.resolve(draft).id, list[ImpossiblePlan](), False
    for factor in (STEPS[0], 1 / STEPS[0]):
        try:
            moved |= round_.resolve(go_to(draft, {name: factor})).id != own
        except ImpossiblePlan as error:
            problems.append(error)
    if len(problems) > 1:
        raise problems[0]
    if not moved and not problems:
        raise ImpossiblePlan(f"no factor on {name!r} moves a zero: nothing else gives or takes any")


class _Climb:
    """A search under way."""

    def __init__(self, round_: Round, draft: Draft, windows: int, left: int) -> None:
        self._round, self._draft, self._windows, self._left = round_, draft, windows, left
        self._window = round_.bench.settings.window
        look = count_windows(round_.bench, windows * self._window // 2, whole=False)
        self._look = look if look > 1 else windows  # one window alone has no error
        self._best: Point = {}
        self._found: dict[str, tuple[Point, Figures]] = {}
        self._losses: dict[str, Evaluation] = {}
        self._ended = ""

    def sweep(self, names: Sequence[str], step: float) -> bool:
        """Move each factor and lever once, as long as there are tokens; whether anything was gained."""
        before = dict(self._best)
        for name in names:
            for by in (step, 1 / step):
                point = move(self._draft, self._best, name, by)
                if not self._ended and point is not None and self._gains(point):
                    break
        return self._best != before and not self._ended

    def _gains(self, point: Point) -> bool:
        """Try a point; whether it is better than the best, and the best from now on."""
        if _key(point) in self._found or not self.try_out(point):
            return False
        ours, theirs = self._losses.get(_key(point)), self._losses.get(_key(self._best))
        if ours is None or theirs is None or len(ours.kl) < len(theirs.kl):
            return False
        change, error = compare_kl(ours, theirs)
        if change >= -error:
            return False
        self._best = point
        return True

    def try_out(self, point: Point) -> bool:
        """Probe the plan at a point; False where that cannot be, or there is nothing left for it."""
        begins, draft = not point, go_to(self._draft, point)
        try:
            takes = self._round.count_tokens(draft, self._windows * self._window)
            if takes > self._left:
                raise ValueError(f"{self._left:,} of its tokens are left, and a probe takes {takes:,}")
            look = self._look if takes and not begins else self._windows  # what is known is read back
            figures = self._probe(point, draft, look)
            if look < self._windows and not self._is_hopeless(figures):
                self._probe(point, draft, self._windows)
        except UserError:  # a full disk, say
            raise
        except ImpossiblePlan as error:
            if begins:
                raise
            self._found[_key(point)] = (point, {"error": str(error)})
            return False
        except ValueError as error:  # too few tokens or seconds beside the trial
            if begins:
                raise
            self._ended = str(error)
            return False
        losses = self._read(self._found[_key(point)][1])
        if losses.finite:
            self._losses[_key(point)] = losses
        elif begins:
            raise ImpossiblePlan("the plan's own loss is not finite; search from another")
        return True

    def _probe(self, point: Point, draft: Draft, windows: int) -> Figures:
        """Probe on so many windows."""
        takes = self._round.count_tokens(draft, windows * self._window)
        (figures,) = probe(self._round, [draft], windows * self._window)
        self._left -= takes
        self._found[_key(point)] = (point, figures)
        return figures

    def _read(self, figures: Figures) -> Evaluation:
        """The losses of a probe on the windows that it was measured on here; an earlier one may have more."""
        windows = figures["tokens"] // self._window
        return self._round.bench.losses.take_part(read_probed(self._round, figures["probe"]), windows)

    def _is_hopeless(self, figures: Figures) -> bool:
        """Whether what was measured of a point so far says that it is not better than the best."""
        losses, best = self._read(figures), self._losses[_key(self._best)]
        if not losses.finite:
            return True
        return find_likelihood_better(losses, self._round.bench.losses.take_part(best, len(losses.kl))) < HOPELESS

    def tell(self) -> Figures:
        """The plan at its best, and the table."""
        ends = {_key({}), _key(self._best)}
        shown = ends | set([key for key in self._found if key not in ends][len(ends) - MOST_ROWS :])
        best, left_out = go_to(self._draft, self._best), len(self._found) - len(shown)
        return {
            "tokens": self._windows * self._window,
            "best": self._best,
            "adjustments": [x.model_dump(exclude_none=True) for x in best.adjustments],
            **({"ended": self._ended} if self._ended else {}),
            "columns": "changes, KL, KL minus the plan's as it was, error, tokens, number of the probe",
            "rows": [self._describe(point, figures) for key, (point, figures) in self._found.items() if key in shown],
            **({"rows_left_out": left_out} if left_out else {}),
        }

    def _describe(self, point: Point, figures: Figures) -> list[Any]:
        if "error" in figures:
            return [point, figures["error"]]
        ours, start = self._losses.get(_key(point)), self._losses[_key({})]
        change: tuple[float | None, float | None] = (None, None)
        if ours:  # none where it was not finite, or ended on half of the windows
            change = compare_kl(ours, self._round.bench.losses.take_part(start, len(ours.kl)))
        return [point, figures["kl"], *map(round_figure, change), figures["tokens"], figures["probe"]]


def _key(point: Point) -> str:
    return str(sorted(point.items()))
