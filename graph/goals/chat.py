"""Make something of a goal with a chat model: what it is shown, and what it may answer."""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from graph.config import RunConfig, read_prompt
from graph.goals.schema import Brief, check_brief, count_allowed
from graph.llm.ask import CallRecord, KeepPrompt, Reply, ask
from graph.llm.ladder import describe_schema
from graph.llm.metering import UNMETERED, Meter
from graph.llm.quoting import data_block, quote_data
from graph.llm.toolbox import do_now
from tools.base.names import hide_directories, name_source
from tools.base.words import show_short

SHOWN = 240
"""Characters of a text that are shown, from its beginning."""


class Sight(NamedTuple):
    """What is known of a named text before anything is pruned."""

    name: str
    begins: str
    """Its calibration windows, from the first token."""
    perplexity: float | None
    """The dense model's, on its validation windows."""
    predicted_kl: float | None
    """By its own KL curves, nats per token, if the run's target were shared out by all texts as the config has them;
    None where whole parts go."""


def brief_with_chat(
    config: RunConfig,
    texts: Sequence[Sight],
    model: BaseChatModel,
    on_call: Callable[[CallRecord], None] | None = None,
    keep_prompt: KeepPrompt = do_now,
    carry_out: Callable[[Callable[[], Reply]], Reply] = do_now,
    meter: Meter = UNMETERED,
) -> Brief:
    """Ask a chat model for the brief of a run. Raises AgentError when no usable one came."""
    return ask(
        model,
        Brief,
        keep_prompt(lambda: brief_messages(config, texts)),
        check=lambda brief: check_brief(brief, config),
        on_call=on_call,
        carry_out=carry_out,
        meter=meter,
    )


def brief_messages(config: RunConfig, texts: Sequence[Sight]) -> list[AnyMessage]:
    """Instructions, and the goal with what there is to weigh."""
    schema = json.dumps(describe_schema(Brief), separators=(",", ":"), ensure_ascii=False)
    parts = [
        f"Model: {quote_data(name_source(config.model), 200)}; {config.target_sparsity:.0%} of its weights go, "
        f"in at most {config.max_iterations} rounds.",
        "The goal:\n" + data_block("goal", [quote_data(line, 2000) for line in config.goal.splitlines()]),
        "The texts:\n" + data_block("texts", [_describe(text, config) for text in texts]),
        _describe_given(config),
        _describe_room(config),
        f"Questions are asked: {_name(config.questions)}." if config.questions else "",
    ]
    return [
        SystemMessage(read_prompt("brief").replace("{schema}", schema)),
        HumanMessage("\n\n".join(part for part in parts if part)),
    ]


def _describe(text: Sight, config: RunConfig) -> str:
    begins, perplexity = quote_data(text.begins, SHOWN), show_short(text.perplexity)
    dense = f"dense perplexity {perplexity}"
    if text.predicted_kl is not None:
        dense += f"; predicted KL {show_short(text.predicted_kl)}"
    return f"{text.name}: from {_name(config.text[text.name])}; {dense}; begins: {begins}"


def _name(source: str) -> str:
    return quote_data(hide_directories(name_source(source)), 200)


def _describe_given(config: RunConfig) -> str:
    """What the person has settled in figures: weights that only the goal's words can overrule, and bounds that hold."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in config.text_weights.items())
    bounds = ", ".join(f"{name} {rise:g}" for name, rise in config.text_bounds.items())
    told = [f"Given with the goal, to be kept where it says nothing else: weights {weights}."] * bool(weights)
    held = [f"max_rise {bounds}"] * bool(bounds)
    held += [f"min_answers {config.min_fact_retention:g}"] * bool(config.min_fact_retention)
    told += [f"Bounds that hold, and may only be tightened: {'; '.join(held)}."] * bool(held)
    return " ".join(told)


def _describe_room(config: RunConfig) -> str:
    most = count_allowed(config)
    return f"new_texts: {most} at most." if most else "new_texts: none; leave the list empty."
