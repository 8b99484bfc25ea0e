"""Every event of a run as plain lines; one of an unexpected shape is shown as it is."""

from collections.abc import Callable, Mapping
from typing import Any

from tools.base.words import clean, count, show_compact, show_percent, show_seconds
from tools.results.sentences import list_outcome, tell_spending, tell_texts

Event = Mapping[str, Any]


def tell_start(event: Event) -> str:
    """The first line of a run."""
    verb = "resumed" if event.get("resumed") else "started"
    target = clean(event["aim"]) if event.get("aim") else f"{show_percent(event['target'], 1)} sparsity"
    return (
        f"{verb} {clean(event['run'])}: {clean(event['model'])} to {target}, "
        f"planned by {clean(event['planner'])}, in {clean(event['directory'], 1000)}"
    )


def tell_profile(event: Event) -> str:
    """What was profiled, and the layers that are dearest to prune."""
    top = ", ".join(f"{clean(name, 100)} {show_compact(kl, 4)}" for name, kl in event["top"][:5])
    told = f"profile: {count(event['layers'], 'layer')}, {count(event['weights'], 'weight')}"
    return f"{told}; most precious: {top}" if top else told


def tell_layers(event: Event) -> str:
    """The range of the sparsities now in the model."""
    values = event["sparsity"]
    if not values:
        return "layers: none"
    least, most = show_percent(min(values), 1), show_percent(max(values), 1)
    return f"layers: {count(len(values), 'layer')}, sparsity {least} to {most}"


def tell_plan(event: Event) -> str:
    """A plan and why."""
    line = f"plan {event['iteration']} by {clean(event['planner'])}: {clean(event['plan'])}"
    line += f", predicted KL {show_compact(event['predicted_kl'], 4)}"
    return f"{line}: {clean(event['reason'], 1000)}" if event.get("reason") else line


def tell_brief(event: Event) -> str:
    """What was made of the goal."""
    line = f"goal, read by {clean(event['planner'])}: {clean(event['line'], 1000)}"
    reason = event["details"].get("reason", "")
    return f"{line}: {clean(reason, 1000)}" if reason else line


def tell_reply(event: Event) -> str:
    """An answer of a planner's model, and what was wrong with it."""
    line = f"reply of {clean(event['planner'])}: {event['input_tokens']:,} tokens in, {event['output_tokens']:,} out"
    line += " by our own count" if event.get("own_count") else ""
    return f"{line}; handed back: {clean(event['problem'], 1000)}" if event.get("problem") else line


def tell_request(event: Event) -> str:
    """A request that brought no answer, and what it counts for."""
    counted = f"counted as {event['input_tokens']:,} tokens in, {event['output_tokens']:,} out"
    line = f"request: {clean(event['planner'])} {clean(event['problem'], 1000)}; {counted}"
    return f"{line}; it is tried again" if event.get("again") else line


def tell_tool(event: Event) -> str:
    """What a planner looked up or tried out before its plan, and what it found."""
    return f"tool {event['iteration']}: {clean(event['tool'], 40)} {clean(event['shown'])}"


def tell_kl(event: Event) -> str:
    """0.2103 ± 0.0040"""
    error = "" if event["kl"] is None or event.get("kl_error") is None else f" ± {show_compact(event['kl_error'], 4)}"
    return show_compact(event["kl"], 4) + error


def tell_facts(event: Event) -> str:
    """, answer probability kept 91.2 % ± 0.8 %; nothing where no questions were asked."""
    share, error = event.get("fact_retention"), event.get("fact_error")
    if share is None:
        return ""
    told = f" ± {show_percent(error, 1)}" if error is not None else ""
    return f", answer probability kept {show_percent(share, 1)}{told}"


def tell_named(event: Event) -> str:
    """; code KL 0.2103 ± 0.0040, perplexity 5.12; …: of each named text; nothing where there is one text."""
    return f"; {told}" if (told := tell_texts(event.get("texts", []))) else ""


def tell_trial(event: Event) -> str:
    """A plan as measured."""
    if event["iteration"] == 0:
        own = [f"{clean(x['name'], 40)} {show_compact(x['perplexity'])}" for x in event.get("texts", [])]
        told = f" ({', '.join(own)})" if own else ""
        return f"trial 0: the dense model, perplexity {show_compact(event['perplexity'])}{told}"
    if event["verdict"] == "refuse":
        return f"trial {event['iteration']}: refused, {clean(event['plan'])}: {clean(event['reason'], 1000)}"
    if event.get("broken"):
        return f"trial {event['iteration']}: broke, {clean(event['plan'])}: {clean(event['reason'], 1000)}"
    line = (
        f"trial {event['iteration']}: {event['verdict']}, sparsity {show_percent(event['sparsity'], 1)}, "
        f"perplexity {show_compact(event['perplexity'])}, KL {tell_kl(event)} "
        f"(predicted {show_compact(event['predicted_kl'], 4)}){tell_named(event)}{tell_facts(event)}, "
        f"{show_seconds(event.get('seconds', 0.0))}, {clean(event['plan'])}"
    )
    return f"{line}: {clean(event['reason'], 1000)}" if event.get("reason") else line


def tell_approval(event: Event) -> str:
    """What a person said to a plan."""
    said = {"accept": "accepted as it is", "edit": "accepted after an edit", "refuse": "refused"}[event["decision"]]
    line = f"approval {event['iteration']}: {said}"
    return f"{line}: {clean(event['reason'], 500)}" if event.get("reason") else line


def tell_rollback(event: Event) -> str:
    """Which weights came back."""
    layers = count(event["layers"], "layer")
    return f"rollback {event['iteration']}: {layers} restored to checkpoint {clean(event['checkpoint'], 80)}"


def tell_accept(event: Event) -> str:
    """Which weights stay."""
    return f"accept {event['iteration']}: checkpoint {clean(event['checkpoint'], 80)}"


def tell_lesson(event: Event) -> str:
    """What a trial taught."""
    figures = f"{clean(event['selector'])} × {event['factor']:.2f}"
    return f"lesson {event['iteration']}: {clean(event['text'], 1000) or figures}"


def tell_usage(event: Event) -> str:
    """What the agents have cost so far."""
    if not event["calls"] and not event.get("failed_requests"):
        return "agents: no calls"
    return f"agents: {tell_spending(event)}"


TELL: dict[str, Callable[[Event], str]] = {
    "start": tell_start,
    "node": lambda e: f"iteration {e['iteration']}: {clean(e['node'])}" if e.get("iteration") else clean(e["node"]),
    "profile": tell_profile,
    "layers": tell_layers,
    "brief": tell_brief,
    "plan": tell_plan,
    "approval": tell_approval,
    "reply": tell_reply,
    "request": tell_request,
    "tool": tell_tool,
    "trial": tell_trial,
    "rollback": tell_rollback,
    "accept": tell_accept,
    "lesson": tell_lesson,
    "lessons": lambda e: f"{count(e['count'], 'lesson')} from {count(e['runs'], 'earlier run')}",
    "usage": tell_usage,
    "note": lambda e: f"note: {clean(e['text'], 1000)}",
    "parting": lambda e: f"parts from the record at {clean(e['text'], 1000)}",
    "fork": lambda e: f"forked from {clean(e['from'], 100)} after iteration {e['iteration']}",
    "warning": lambda e: f"warning: {clean(e['text'], 1000)}",
    "result": lambda e: "\n".join(list_outcome(e)),
    "pushed": lambda e: f"pushed: {clean(e['url'], 1000)}",
    "stopped": lambda e: f"stopped: {clean(e['reason'], 1000)}\nresume with: {clean(e['resume'], 1000)}",
}

SHOWN = {*TELL, "progress"}
UNEXPECTED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def tell_unknown(event: Event) -> str:
    """An event nobody told the display about, or one that lacks a field: shown as it is."""
    return " ".join(f"{clean(key, 50)}={clean(value, 100)}" for key, value in event.items())


def tell(event: Event) -> str:
    """The plain lines of an event; an event of an unexpected shape is shown as it is and never ends a run."""
    try:
        return TELL[event["type"]](event)
    except UNEXPECTED:
        return tell_unknown(event)
