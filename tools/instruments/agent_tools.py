"""A planner's instruments as LangChain tools, for agents and for anyone who binds them to a model.

Thin wrappers: each checks its arguments by schema, calls one plain function, and answers in JSON. They work on the
one open workbench, one after another; give ToolNode `{"max_concurrency": 1}`, since it runs calls in parallel.
"""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self

from langchain_core.tools import BaseTool, tool
from pydantic import BaseModel, Field, WithJsonSchema, model_validator

from tools.base.settings import MOST_PROBES
from tools.base.words import count, spare_brackets
from tools.instruments.comparisons import Figures
from tools.instruments.functions import OF_PLANS, Draft, Round, inspect_layers, predict, predict_all, predict_cut, probe
from tools.plans.groups import describe_levers
from tools.plans.layer_profile import MOST_SELECTOR

# Spelt out, the plan's schema would be sent once more for each tool that takes one.
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "A plan: its sparsity, recipe, groups, adjustments; alone.",
}
DraftArgument = Annotated[Draft, WithJsonSchema(_SCHEMA)]
OneDraftArgument = Annotated[Draft | None, WithJsonSchema(_SCHEMA)]
PlainDraftArgument = Annotated[Draft, WithJsonSchema({"type": "object"})]


class _Arguments(BaseModel):
    """What a tool is called with, and nothing else: what nobody reads would be missed by whoever gave it."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        """By hand, for `extra="forbid"` would stand in every schema that a model is sent."""
        if isinstance(given, dict) and (unknown := sorted(map(str, given.keys() - cls.model_fields.keys()))):
            raise ValueError(f"no argument is called {unknown[0][:40]!r}; there are: {', '.join(cls.model_fields)}")
        return given


class InspectArguments(_Arguments):
    """Which layers."""

    selector: str = Field(
        min_length=1,
        max_length=MOST_SELECTOR,
        description="Which layers, such as '*.v_proj' or 'blocks 0-3 · *.v_proj'.",
    )


class PredictCutArguments(_Arguments):
    """A plan."""

    plan: DraftArgument


class PredictArguments(BaseModel):
    """A plan or a few."""

    plan: OneDraftArgument = None
    plans: list[PlainDraftArgument] = Field(
        default=[], max_length=MOST_PROBES, description=f"Instead of plan: up to {MOST_PROBES} of them, compared."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_plans(cls, given: Any) -> Any:
        """Models give a list as the plan, one plan as the list, and beside plans what all of them have in common."""
        if not isinstance(given, dict):
            return given
        levers = {name: value for name, value in given.items() if name in Draft.model_fields}
        given = {name: value for name, value in given.items() if name not in levers}
        if unknown := sorted(map(str, given.keys() - ProbeArguments.model_fields.keys() - OF_PLANS)):
            raise ValueError(f"no argument and no lever of a plan is called {unknown[0][:40]!r}")
        plan, plans = given.get("plan"), given.get("plans") or []
        if isinstance(plan, list) and not plans:
            plan, plans = None, plan
        if levers and plan is None and not plans:
            plan = {}

        def fill(draft: Any) -> Any:
            return {**levers, **draft} if isinstance(draft, dict) else draft

        return {
            **given,
            "plan": fill(plan),
            "plans": [fill(x) for x in (plans if isinstance(plans, list) else [plans])],
        }

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.plan is None) == (not self.plans):
            raise ValueError(f"give a plan, or up to {MOST_PROBES} plans")
        return self


class ProbeArguments(PredictArguments):
    """A plan or a few, and how much text each is measured on."""

    tokens: int | None = Field(
        None, ge=1, description="Tokens of validation text, rounded up to whole windows; half of it where left out."
    )
    whole: bool = Field(False, description="All of the text, whatever tokens says.")


class HistoryArguments(_Arguments):
    """How many trials."""

    n: int = Field(10, ge=1, le=50, description="How many trials, counted from the last.")


MOST_CANDIDATES = 12
"""Whoever asks for more plans is given so many."""


class CandidatesArguments(_Arguments):
    """How many plans."""

    n: int = Field(4, ge=1, description="How many plans, likeliest first.")


class RecallArguments(_Arguments):
    """What about."""

    query: str = Field(max_length=200, description="A few words, such as a selector, a method or a kind of layer.")


def make_planner_tools(
    round_: Round,
    *,
    history: Callable[[int], Sequence[str]],
    recall: Callable[[str], Sequence[str]],
    candidates: Callable[[int], Sequence[Figures]] | None = None,
    cuts: bool = False,
) -> list[BaseTool]:
    """The instruments of a planner: five, and a sixth where there are `candidates`; three where `cuts` are planned.

    Each answers in JSON; its artifact is the same in a few words for people. `history` gives a line for each of the
    last trials, `recall` one for each lesson that a query finds, `candidates` so many plans that a rule would try.
    """

    @tool("inspect_layers", args_schema=InspectArguments, response_format="content_and_artifact")
    def inspect_tool(selector: str) -> tuple[str, str]:
        """Weights, scores and KL at five sparsities of every layer that a selector means. Costs nothing."""
        figures = inspect_layers(round_, selector)
        return _answer(**figures), f"{selector} -> {figures['layers']} layers"

    @tool("predict", args_schema=PredictArguments, response_format="content_and_artifact")
    def predict_tool(plan: Draft | None, plans: list[Draft]) -> tuple[str, str]:
        """KL of plans by KL curves, and the sparsities they give. Costs nothing, but for curves not measured yet."""
        if plan:
            figures = predict(round_, plan)
            return _answer(**figures), f"{_describe(plan)} -> {_describe_prediction(figures)}"
        figures = predict_all(round_, plans)
        told = list(zip(map(_describe, plans), figures["plans"], strict=True))
        figures["plans"] = [{"plan": described} | own for described, own in told]
        return _answer(**figures), "; ".join(f"{described} -> {_describe_prediction(own)}" for described, own in told)

    @tool("probe", args_schema=ProbeArguments, response_format="content_and_artifact")
    def probe_tool(plan: Draft | None, plans: list[Draft], tokens: int | None, whole: bool) -> tuple[str, str]:
        """Carry plans out, measure KL and perplexity on some validation text, undo them. Each costs pruning once."""
        found = probe(round_, [plan] if plan else plans, tokens, whole=whole)
        if plan:
            return _answer(**found[0]), f"{_describe(plan)} -> {_describe_probe(found[0])}"
        answers = [{"plan": _describe(draft)} | figures for draft, figures in zip(plans, found, strict=True)]
        shown = [f"{answer['plan']} -> {_describe_probe(answer)}" for answer in answers]
        return _answer(plans=answers), "; ".join(shown)

    @tool("history", args_schema=HistoryArguments, response_format="content_and_artifact")
    def history_tool(n: int) -> tuple[str, str]:
        """The last trials of this run, with their plans and figures in full. Costs nothing."""
        lines = history(n)
        return _answer(trials=lines), f"{n} -> {count(len(lines), 'trial')}"

    @tool("recall", args_schema=RecallArguments, response_format="content_and_artifact")
    def recall_tool(query: str) -> tuple[str, str]:
        """What this and earlier runs learnt on this model and its relatives. Costs nothing."""
        lines = recall(query)
        return _answer(lessons=lines), f"{query} -> {count(len(lines), 'lesson')}"

    @tool("predict", args_schema=PredictCutArguments, response_format="content_and_artifact")
    def predict_cut_tool(plan: Draft) -> tuple[str, str]:
        """What goes by a plan, and its KL by the table. Costs nothing."""
        figures = predict_cut(round_, plan)
        return _answer(**figures), f"{_describe(plan)} -> {_describe_prediction(figures)}"

    if cuts:
        return [predict_cut_tool, probe_tool, history_tool]
    tools = [inspect_tool, predict_tool, probe_tool, history_tool, recall_tool]
    return [*tools, _make_candidates_tool(candidates)] if candidates else tools


def _make_candidates_tool(list_plans: Callable[[int], Sequence[Figures]]) -> BaseTool:
    @tool("candidates", args_schema=CandidatesArguments, response_format="content_and_artifact")
    def candidates_tool(n: int) -> tuple[str, str]:
        """A rule's untried plans, by what helped other models, likeliest first: costs nothing."""
        plans = list_plans(min(n, MOST_CANDIDATES))
        return _answer(plans=plans), f"{n} -> {count(len(plans), 'plan')}"

    return candidates_tool


def _describe(draft: Draft) -> str:
    return f"{describe_levers(draft)}{f' · {draft.alone} alone' if draft.alone else ''}"


def _describe_prediction(figures: Figures) -> str:
    return figures.get("error") or f"predicted KL {figures['predicted_kl']}"


def _describe_probe(figures: Figures) -> str:
    return figures.get("error") or f"KL {figures['kl']} on {figures['tokens']} tokens"


def _answer(**figures: Any) -> str:
    return spare_brackets(json.dumps(figures, ensure_ascii=False))
