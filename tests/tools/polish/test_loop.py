"""Steps, measures and what is kept of them, on a problem whose every figure is known."""

import copy
from collections.abc import Sequence
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import make_tiny_model
from tools.base.errors import BrokenPlan
from tools.base.progress import Stopped, heed_stop, ignore_progress, stop_at
from tools.models.layers import Layer, find_layers
from tools.plans.costs import Means, Schedule
from tools.polish.gradients import KL, Survivors
from tools.polish.loop import Adam, Kept, Polish, Standing
from tools.statistics.shards import Sums

SCHEDULE = Schedule([[0, 1], [2], [1, 0], [2]], [3], [1, 2, 3, 4], [2, 4])


class Distance:
    """Half the squared distance of the first layer's survivors to where each window would have them; 2 tokens each."""

    def __init__(self, layer: Layer, survivors: Survivors, nan_at: int = -1) -> None:
        self.layer, self.survivors, self.nan_at = layer, survivors, nan_at
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def _differences(self, windows: Sequence[int]) -> list[Tensor]:
        heed_stop()
        values_S = self.survivors.gather(self.layer.name, self.layer.weight_OI)
        return [values_S - 0.1 * (window + 1) for window in windows]

    def count_tokens(self, windows: Sequence[int]) -> int:
        return 2 * len(windows)

    def measure(self, windows: Sequence[int]) -> float:
        self.asked.append(("measure", tuple(windows)))
        return sum(float(x.square().sum()) / 2 for x in self._differences(windows)) / self.count_tokens(windows)

    def differentiate(self, windows: Sequence[int]) -> Sums:
        self.asked.append(("step", tuple(windows)))
        differences = self._differences(windows)
        kl = torch.stack([x.square().sum() / 2 for x in differences]).sum().double()
        if sum(what == "step" for what, _ in self.asked) == self.nan_at:
            kl = kl * torch.nan
        return {KL: kl, self.layer.name: torch.stack(differences).sum(0)}


class Drawer:
    """What was kept last, as another process would read it."""

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.times: list[int] = []

    def read(self) -> Kept | None:
        return copy.deepcopy(self.kept)

    def keep(self, kept: Kept) -> None:
        self.kept = copy.deepcopy(kept)
        self.times.append(kept.standing.step)


def begin(
    drawer: Drawer | None = None, schedule: Schedule = SCHEDULE, means: Means = "fp32", **options: int
) -> tuple[Polish, Distance]:
    layer = find_layers(make_tiny_model("llama"))[0]
    layer.write(layer.weight_OI * (layer.weight_OI > 0))
    survivors = Survivors([layer])
    values, problem = survivors.read(), Distance(layer, survivors, **options)
    ticks = iter(range(10**6))
    keeper = drawer or Drawer()
    polish = Polish(
        problem, survivors, values, Adam(values, means), schedule, keeper, ignore_progress, lambda: float(next(ticks))
    )
    return polish, problem


def test_every_step_and_measure_is_done_once_in_its_turn_and_the_lowest_is_kept() -> None:
    drawer = Drawer()
    polish, problem = begin(drawer)
    standing = polish.run()
    held = ("measure", (3,))
    assert problem.asked == [held, *(x for step in SCHEDULE.steps for x in (("step", tuple(step)), held))]
    assert standing.step == 4 and standing.best == 4 and len(standing.held_out) == 5
    assert standing.held_out == sorted(standing.held_out, reverse=True)
    name = problem.layer.name
    assert torch.equal(polish.best[name], polish.values[name])
    assert drawer.times == [2], "after each pass but the last"


def test_what_never_gets_better_ends_early_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.polish.loop.RATE", 1e4)  # far beyond where it should be
    steps = [[0]] * 20
    polish, _ = begin(schedule=Schedule(steps, [0], list(range(1, 21)), [20]))
    standing = polish.run()
    assert standing.best == 0 and polish.best == {}
    assert (standing.step, len(standing.held_out)) == (4, 5), "after four measures without a better one"


@pytest.mark.parametrize("at", range(1, 10))
def test_stopped_anywhere_and_gone_on_with_it_comes_to_the_same_bits(at: int) -> None:
    whole, whole_problem = begin()
    expected = whole.run()
    drawer, event = Drawer(), Event()
    polish, problem = begin(drawer)
    ask = problem._differences

    def ask_and_stop(windows: Sequence[int]) -> list[Tensor]:
        if len(problem.asked) == at:
            event.set()
        return ask(windows)

    problem._differences = ask_and_stop  # type: ignore[method-assign]
    with stop_at(event), pytest.raises(Stopped):
        polish.run()
    again, rest = begin(drawer)
    standing = again.run()
    assert standing.model_dump(exclude={"seconds"}) == expected.model_dump(exclude={"seconds"})
    name = problem.layer.name
    assert torch.equal(again.best[name], whole.best[name]) and torch.equal(again.values[name], whole.values[name])
    assert rest.asked == whole_problem.asked[at - 1 :], "what was under way is done again, and nothing before it"


@pytest.mark.parametrize("means", ["fp32", "bf16"])
def test_what_was_kept_last_is_gone_on_from_after_a_kill(means: Means) -> None:
    whole, _ = begin(means=means)
    whole.run()
    half = Drawer()
    polish, _ = begin(half, means=means)

    class Killed(BaseException):
        pass

    def keep(kept: Kept) -> None:
        half.kept = copy.deepcopy(kept)
        raise Killed

    half.keep = keep  # type: ignore[method-assign]
    with pytest.raises(Killed):
        polish.run()
    assert half.kept is not None and half.kept.standing.step == 2
    del half.keep
    again, _ = begin(half, means=means)
    again.run()
    kinds = [(again.values, whole.values), (again.best, whole.best)]
    kinds += [(again.optimiser.state[what], state) for what, state in whole.optimiser.state.items()]
    assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in kinds for name in theirs)


@pytest.mark.parametrize(("takes", "times"), [(0, [6, 12, 18, 24, 30, 36]), (20, [6, 26])])
def test_what_takes_long_to_keep_is_kept_less_often(takes: int, times: list[int]) -> None:
    now, drawer = [0.0], Drawer()
    polish, problem = begin(drawer, Schedule([[0]] * 40, [3], [40], [40]))
    keep, differentiate = drawer.keep, problem.differentiate

    def pass_time(seconds: float, work: Any) -> Any:
        now[0] += seconds
        return work

    drawer.keep = lambda kept: pass_time(takes, keep(kept))  # type: ignore[method-assign]
    problem.differentiate = lambda windows: pass_time(10, differentiate(windows))  # type: ignore[method-assign]
    polish.clock = lambda: now[0]
    polish.run()
    assert drawer.times == times, "each step takes ten seconds; a minute, or ten times as long as keeping takes"


def test_a_loss_that_is_not_finite_breaks_the_plan() -> None:
    with pytest.raises(BrokenPlan, match=r"^polish: the loss is not finite$"):
        begin(nan_at=2)[0].run()


def test_progress_tells_losses_and_speed() -> None:
    told: list[tuple[str, int, int]] = []
    polish, _ = begin()
    polish.progress = lambda *tick: told.append(tick)
    standing = polish.run()
    assert told[0] == ("polish", 0, 4)
    assert told[1] == (f"polish · held out {standing.held_out[0]:.4f}", 0, 4)
    label = f"polish · KL {standing.trained:.4f}, held out {standing.held_out[-1]:.4f}, "
    assert told[-1][0].startswith(label) and told[-1][0].endswith(" tokens/s") and told[-1][1:] == (4, 4)
    assert Standing(step=1, held_out=[2.0, 1.0, 1.0, 3.0]).best == 1
