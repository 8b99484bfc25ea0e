"""What agents are told of named texts; nothing where there are none."""

from graph.config import RunConfig
from graph.llm.quoting import data_block, quote_data
from tools.base.words import show_short
from tools.results.trial import Trial


def describe_shares(config: RunConfig, left: int = 0) -> str:
    """What each text counts, and how many more plans may have the model write."""
    told = [f"{name} {share:.2f}" for name, share in config.text_shares.items()]
    if not told:
        return ""
    more = f" `new_texts`: {left} more." if config.goal_tokens else ""
    return f" Texts and their weights: {', '.join(told)}; perplexity and KL are the means by weight.{more}"


def describe_bounds(config: RunConfig, dense: Trial) -> str:
    """How far the perplexity of a text may rise, in figures that rounds are compared with."""
    known = {text.name: text.perplexity for text in dense.texts if text.perplexity is not None}
    told = [
        f"{name} {show_short((1 + rise) * known[name])} ({1 + rise:g} times the dense {show_short(known[name])})"
        for name, rise in config.text_bounds.items()
        if name in known
    ]
    return f" Whatever that allows, a round is rolled back above a perplexity on {', '.join(told)}." if told else ""


def describe_goal(config: RunConfig) -> str:
    """The words that weights and bounds stand for."""
    words = quote_data(" ".join(config.goal.splitlines()), 2000)
    return f" The goal that they stand for:\n{data_block('goal', [words])}" if words else ""


def describe_dense(dense: Trial) -> str:
    """` (code 4, prose 9)`: the dense model's perplexities."""
    told = [f"{text.name} {show_short(text.perplexity)}" for text in dense.texts]
    return f" ({', '.join(told)})" if told else ""


def describe_texts(trial: Trial) -> str:
    """`; code KL 0.21 +- 0.004, perplexity 4.4, prose KL 0.05 +- 0.001, perplexity 9.1`."""
    told = [
        f"{text.name} KL {show_short(text.kl)} +- {show_short(text.kl_error)}, perplexity {show_short(text.perplexity)}"
        for text in trial.texts
    ]
    return f"; {', '.join(told)}" if told else ""
