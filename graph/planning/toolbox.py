"""The instruments that a chat planner may use before it answers, and their budget."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_core.tools import BaseTool
from langgraph.store.base import BaseStore
from pydantic import BaseModel

from graph.config import HEURISTIC
from graph.llm.toolbox import ToolAnswer, Toolbox, ToolRecord
from graph.memory.lessons import search_lessons
from graph.planning.brief import describe_lesson, recount_trial
from graph.planning.choose import weigh_in_bounds
from graph.planning.orders import measure_with
from graph.planning.plan import Plan
from graph.planning.situation import Situation
from graph.runs.session import OpenBench, Session
from graph.runs.tasks import do_once
from graph.state import State
from tools.plans.layer_profile import group_layers
from tools.plans.work_order import WorkOrder

if TYPE_CHECKING:
    from tools.instruments.functions import Draft, Round
    from tools.workbench.bench import Workbench


@dataclass
class Evaluated:
    """Tokens that were put through pruned models."""

    tokens: int
    limit: int
    """0 for none."""
    trial: int
    """Those that the trial after it will take."""

    def book(self, tokens: int) -> None:
        """Count those of a probe. Raises ValueError when the trial that follows would go over the limit."""
        left = self.limit - self.tokens - self.trial
        if self.limit and tokens > left:
            raise ValueError(f"a probe of {tokens:,} tokens is too much: {max(left, 0):,} are left beside the trial")
        self.tokens += tokens


class Measured(BaseModel):
    """What a tool answered, and what had been evaluated with it."""

    answer: ToolAnswer
    evaluated_tokens: int


def open_toolbox(
    open_bench: OpenBench,
    situation: Situation,
    state: State,
    session: Session,
    store: BaseStore | None,
    evaluated: Evaluated,
) -> Toolbox | None:
    """The instruments of a chat planner and their budget of this round; None where it has none."""
    config = situation.config
    if config.planner == HEURISTIC or not config.planner_calls:
        return None

    def recall(query: str) -> list[str]:
        return [describe_lesson(lesson, config) for lesson in search_lessons(store, config, query)] if store else []

    def recount(n: int) -> list[str]:
        return [recount_trial(trial) for trial in situation.trials[-n:]]

    @contextmanager
    def offer() -> Iterator[Sequence[BaseTool]]:
        with open_bench() as bench:
            from tools.instruments.agent_tools import make_planner_tools  # torch again, imported by now

            round_ = _describe_round(bench, situation, state, session, evaluated)
            yield make_planner_tools(round_, history=recount, recall=recall)

    def carry_out(call: Callable[[], ToolAnswer]) -> ToolAnswer:
        def measure() -> Measured:
            return Measured(answer=call(), evaluated_tokens=evaluated.tokens)

        kept = do_once("tool", measure, Measured)
        evaluated.tokens = kept.evaluated_tokens
        return kept.answer

    def tell(record: ToolRecord) -> None:
        session.emit("tool", iteration=situation.iteration, **record.model_dump())

    return Toolbox(offer, calls=config.planner_calls, seconds=config.planner_seconds, on_tool=tell, carry_out=carry_out)


def _describe_round(
    bench: "Workbench", situation: Situation, state: State, session: Session, evaluated: Evaluated
) -> "Round":
    """What the instruments work on."""
    from tools.instruments.functions import Round

    measure = measure_with(bench, state.profile, state.current, session.progress)

    def resolve(draft: "Draft") -> WorkOrder:
        plan = Plan(sparsity=draft.sparsity, recipe=draft.recipe, adjustments=draft.adjustments)
        return situation.orders.resolve(weigh_in_bounds(plan, situation), measure)

    return Round(
        bench=bench,
        profile=state.profile,
        resolve=resolve,
        progress=session.progress,
        present=state.current,
        book=evaluated.book,
        keep=state.kept,
        groups={selector: [x.name for x in group] for selector, group in group_layers(situation.layers).items()},
    )
