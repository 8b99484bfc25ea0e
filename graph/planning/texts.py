"""What agents are told of named texts; nothing where there are none."""

from graph.config import RunConfig
from graph.state import Trial
from tools.base.words import show_short


def describe_shares(config: RunConfig) -> str:
    """What each text counts."""
    told = [f"{name} {share:.2f}" for name, share in config.text_shares.items()]
    return f" Texts and their weights: {', '.join(told)}; perplexity and KL are the means by weight." if told else ""


def describe_texts(trial: Trial) -> str:
    """`; code KL 0.21 +- 0.004, prose KL 0.05 +- 0.001`."""
    told = [f"{text.name} KL {show_short(text.kl)} +- {show_short(text.kl_error)}" for text in trial.texts]
    return f"; {', '.join(told)}" if told else ""
