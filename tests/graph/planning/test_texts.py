"""What agents are told of named texts."""

from dataclasses import replace

from graph.config import RunConfig
from graph.planning.brief import planner_messages
from graph.planning.refinements import STRONG
from graph.planning.texts import describe_shares, describe_texts
from tests.situations import make_situation, make_trial
from tools.results.schema import TextFigures

CODE = TextFigures(name="code", weight=0.75, perplexity=4.0, kl=0.21, kl_error=0.004)
PROSE = TextFigures(name="prose", weight=0.25, perplexity=9.0, kl=None, kl_error=None)
NAMED = RunConfig(text={"code": "pydoc", "prose": "self"}, text_weights={"code": 3, "prose": 1})


def test_a_planner_is_shown_weights_and_the_kl_of_each_text() -> None:
    trial = make_trial(1, "accept", 0.3, STRONG).model_copy(update={"texts": [CODE, PROSE]})
    told = planner_messages(replace(make_situation(trial), config=NAMED))[1].content
    assert describe_shares(NAMED) in told and describe_texts(trial) in told
    assert describe_shares(NAMED) == (
        " Texts and their weights: code 0.75, prose 0.25; perplexity and KL are the means by weight."
    )
    assert describe_texts(trial) == "; code KL 0.21 +- 0.004, prose KL not finite +- not finite"


def test_without_named_texts_nothing_is_said_of_them() -> None:
    assert describe_shares(RunConfig()) == describe_texts(make_trial(1, "accept", 0.3, STRONG)) == ""
