"""What the weights of named texts were worth: the kept plan carried out once more by other weights, and compared."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from graph.config import RunConfig
from graph.planning.orders import find_order
from graph.planning.plan import Plan
from graph.runs.session import Session
from graph.state import State
from tools.base.errors import BrokenPlan, ImpossiblePlan
from tools.measure.texts import list_texts
from tools.plans.mix import Mix, read_mix
from tools.results.schema import Weighting
from tools.results.sentences import describe_weighting

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.results.losses import Evaluation
    from tools.workbench.bench import Workbench


def find_shares(config: RunConfig, plan: Plan) -> dict[str, float]:
    """What each named text counts in what a plan fits: as the plan mixes them, or else as in the run."""
    mix = dict(plan.recipe.mix)
    return {name: mix.get(name, 0.0) for name in config.text} if mix else config.text_shares


def list_other_weights(shares: Mapping[str, float], written: Collection[str] = ()) -> list[Mix]:
    """What a plan's shares of the texts are compared with: all texts alike, and the one that counts most left out.

    Texts that were `written` for single plans count nothing in either.
    """
    fitted, shares = read_mix(shares), {name: share for name, share in shares.items() if name not in written}
    most = max(shares, key=shares.__getitem__)
    rest = {name: share for name, share in shares.items() if name != most}
    alike, without = dict.fromkeys(shares, 1.0), rest if any(rest.values()) else dict.fromkeys(rest, 1.0)
    mixes = dict.fromkeys(read_mix(weights) for weights in (alike, without))
    return [mix for mix in mixes if mix and mix != fitted]


def weigh_otherwise(bench: "Workbench", state: State, session: Session) -> list[Weighting]:
    """What each text loses of the accepted weights, then of its plan shared out and pruned by each of the others.

    On the validation windows that the run's own plans were judged by. None where nobody asked for it, and with a
    warning where the plan prunes nothing by weights. The weights in the model end as any.
    """
    plan = state.accepted_plan
    if not state.config.check_weights:
        return []
    if plan is None or any(group.recipe.mix for group in plan.groups):
        what = "fitted by other weights in some of its layers" if plan else "of no plan that was accepted last"
        session.warn(f"the model that is kept is {what}, so that weights of texts are not compared")
        return []
    own = bench.evaluator.evaluate(state.accepted, "validation", state.profile, session.progress)
    shares = find_shares(state.config, plan)
    found = [Weighting(weights=shares, texts=list_texts(own))]
    for mix in list_other_weights(shares, [text.name for text in state.written]):
        try:
            theirs = measure_by(bench, state, plan, mix, session.progress)
        except (ImpossiblePlan, BrokenPlan) as error:
            session.warn(f"the kept plan by other weights of texts: {error}; they are not compared")
            continue
        weights = {name: dict(mix).get(name, 0.0) for name in state.config.text}
        found.append(Weighting(weights=weights, texts=list_texts(theirs, own)))
        session.emit("note", text=describe_weighting(found[-1]))
    return found


def measure_by(bench: "Workbench", state: State, plan: Plan, mix: Mix, progress: "Progress") -> "Evaluation":
    """Losses of a plan on the validation text, by other weights of texts; its layers are let go again.

    Raises ImpossiblePlan, and BrokenPlan where it cannot be carried out.
    """
    other = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"mix": mix})})
    order = find_order(bench, state.model_copy(update={"plan": other, "order": ""}), progress)
    checkpoint = bench.pruner.prune(state.profile, order, progress)
    losses = bench.evaluator.evaluate(
        checkpoint, "validation", state.profile, progress, "validation, other weights of texts"
    )
    bench.pruner.forget([state.accepted])
    return losses
