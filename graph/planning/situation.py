"""All that any planner may know when it plans a round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from graph.planning.orders import Curves, Orders, hash_request, keep_order, measure_with, read_curves
from graph.planning.past import take_latest
from graph.planning.plan import Plan
from graph.planning.recipes import count_left
from graph.reflecting.schema import Experience, Lesson, Note
from graph.state import State, last_accepted
from tools.instruments.probed import PastProbe
from tools.plans.budget import SAME_SPARSITY, same_sparsity
from tools.plans.cuts import Parts
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder
from tools.results.losses import compare_kl
from tools.results.schema import Usage
from tools.results.trial import Trial

if TYPE_CHECKING:
    from graph.runs.session import OpenBench
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench


@dataclass(frozen=True)
class Situation:
    """All that a planner may know when it plans a round."""

    config: RunConfig
    layers: Sequence[LayerProfile]
    """The profile, in the model's order."""
    sparsity: dict[str, float]
    """Layer name to the share of its weights that are zero in the last accepted weights; may be empty."""
    dense: Trial
    accepted: Trial | None = None
    """The last trial that was kept."""
    accepted_plan: Plan | None = None
    """The plan that made it."""
    trials: Sequence[Trial] = field(default=())
    lessons: Sequence[Lesson] = field(default=())
    experience: Sequence[Experience] = field(default=())
    """What levers did to KL in earlier runs."""
    notes: Sequence[Note] = field(default=())
    """A reflector's, of this and earlier runs, oldest first."""
    beside: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """KL minus that of the weights kept last and its standard error, paired, of trials before theirs at the same
    sparsity, by their rounds: later ones were compared with them as they were judged."""
    judged: Mapping[int, str] = field(default_factory=dict)
    """What a reflector said of rounds, by their numbers."""
    probes: Sequence[PastProbe] = field(default=())
    """What probes of earlier rounds measured, oldest first."""
    iteration: int = 1
    """Number of the round to plan, from 1."""
    is_last: bool = False
    """Whether the run ends after this round, unless it improves on what was kept at the target."""
    read_layers: Callable[[Recipe], Curves] | None = None
    """What is known of the layers for a recipe's allocation, without a run of the model; without it, `layers`."""
    budget: TokenBudget | None = None
    """What was spent and what is left; None where nothing is counted."""
    seconds: float = 0.0
    """Spent in the run's nodes before this round."""
    usage: Usage = field(default_factory=Usage)
    """What the agents have spent before this round."""
    architecture: str = ""
    """The class of the model."""
    parts: Parts | None = None
    """What is known of the model's parts, in a run that takes them away."""
    texts_left: int = 0
    """Texts that plans may still have the model write."""

    @property
    def at_target(self) -> bool:
        """Whether what was kept last has the target sparsity, so that rounds go on to lower its KL."""
        return self.accepted is not None and self.accepted.sparsity >= self.config.target_sparsity - SAME_SPARSITY

    @property
    def broken(self) -> set[str]:
        """Methods that broke whenever they were carried out; of those of several groups nobody knows which did."""
        broke = {trial.recipe.method for trial in self.trials if trial.recipe and trial.broken and not trial.groups}
        return broke - {trial.recipe.method for trial in self.trials if trial.recipe and trial.measured}

    @cached_property
    def orders(self) -> Orders:
        """What plans of this round come to."""
        return Orders(self.config, self.lessons, self.layers, self.read_layers, self.parts)

    def find_trial(self, plan: Plan) -> Trial | None:
        """The last trial, refused ones among them, that this plan would only repeat. Raises ImpossiblePlan.

        Nothing is measured: what hangs on curves that nobody has measured yet, or on texts that nobody has written,
        was not tried.
        """
        if plan.new_texts:
            return None
        weighed = self.orders.weigh(plan)
        made = self.orders.identify(weighed)
        return next((trial for trial in reversed(self.trials) if made and trial.order == made), None)

    def find_expense(self, plan: Plan) -> str:
        """Why there are not the tokens for a plan; empty where there are. Raises ImpossiblePlan."""
        if self.budget is None:
            return ""
        weighed = self.orders.weigh(plan)
        drafted = bool(self.orders.list_unknown(weighed))
        return self.budget.refuse(weighed, self.orders.draft(weighed), drafted=drafted)

    def find_broken(self, plan: Plan) -> Trial | None:
        """The last trial that broke, and that this plan would only repeat, whatever lessons made of it since.

        Raises ImpossiblePlan.
        """
        made, asked = "" if plan.new_texts else self.orders.identify(self.orders.weigh(plan)), hash_request(plan)
        for trial in reversed(self.trials):
            if trial.broken and (trial.asked == asked or (trial.order and trial.order == made)):
                return trial
        return None


def gather_situation(
    open_bench: "OpenBench", state: State, progress: "Progress", *, is_last: bool, budget: TokenBudget | None = None
) -> Situation:
    """The situation of the round that the state is in, with the weights in the model that the state says."""
    assert state.dense is not None, "profile runs first"

    def read_layers(recipe: Recipe) -> Curves:
        with open_bench() as bench:
            return read_curves(bench, state.profile, recipe, progress)

    with open_bench() as bench:
        return Situation(
            config=state.config,
            layers=bench.profiles.read(state.profile).layers,
            read_layers=read_layers,
            sparsity=dict(zip(bench.weights.by_name, bench.weights.sparsities(), strict=True)),
            dense=state.dense,
            accepted=last_accepted(state.trials),
            accepted_plan=state.accepted_plan,
            trials=state.trials,
            lessons=state.lessons,
            experience=state.experience,
            notes=state.notes,
            beside=_compare_trials(bench, state.trials),
            judged=state.judged,
            probes=take_latest(state.probes),
            iteration=state.iteration,
            is_last=is_last,
            budget=budget,
            seconds=state.seconds,
            usage=state.usage,
            architecture=type(bench.model).__name__,
            parts=bench.cuts.read(state.parts) if state.parts else None,
            texts_left=count_left(state),
        )


def _compare_trials(bench: "Workbench", trials: Sequence[Trial]) -> dict[int, tuple[float, float]]:
    """What `Situation.beside` has, as far as losses are on disk."""
    kept = last_accepted(trials)
    ours = bench.evaluator.read_validation(kept.checkpoint) if kept else None
    if kept is None or ours is None or not ours.finite:
        return {}
    earlier = [x for x in trials if x.iteration < kept.iteration and x.measured and x.checkpoint != kept.checkpoint]
    found = {}
    for trial in (x for x in earlier if same_sparsity(x.sparsity, kept.sparsity)):
        theirs = bench.evaluator.read_validation(trial.checkpoint)
        if theirs is not None and theirs.finite and theirs.texts == ours.texts:
            found[trial.iteration] = compare_kl(theirs, ours)
    return found


def resolve_plan(
    open_bench: "OpenBench", situation: Situation, state: State, plan: Plan, progress: "Progress"
) -> tuple[WorkOrder, str]:
    """The plan's order, and the hash of its artifact. Raises ImpossiblePlan, and BrokenPlan as `describe_layers`."""
    with open_bench() as bench:
        order = situation.orders.resolve(plan, measure_with(bench, state.profile, state.current, progress))
        return order, keep_order(bench.store, plan, order)
