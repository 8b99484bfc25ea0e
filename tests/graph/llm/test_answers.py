"""JSON in prose: it is found wherever it is, and what is wrong with it is said so that a model can act on it."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.llm.answers import parse_reply
from graph.planning.plan import Plan
from tools.base.secrets import redact


def parse_plan(text: str) -> Plan:
    plan = parse_reply(text, Plan, tools=False)
    assert isinstance(plan, Plan)
    return plan


def test_many_problems_are_summed_up() -> None:
    bad = {"sparsity": 0.3, "adjustments": [{"selector": "x" * 5_000, "action": "factor", "factor": -1}] * 60}
    with pytest.raises(ValueError, match=r"adjustments\.0\.selector") as caught:
        parse_plan(json.dumps(bad))
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 110 more"
    assert len(str(caught.value)) <= 1_000


@pytest.mark.parametrize(
    ("text", "sparsity"),
    [
        ('{"sparsity": 0.4}', 0.4),
        ('[{"sparsity": 0.4}]', 0.4),
        ('First {"sparsity": 0.3}, no: {"sparsity": 0.4}. Not {"a": 1}.', 0.4),
        ('{"sparsity": 0.4, "reason": "a\nb }{ <think>"}', 0.4),
        ('<think>{"sparsity": 0.3}</think>{"sparsity": 0.4}', 0.4),
        ('<thinking>{</thinking> {"sparsity": 0.4}', 0.4),
        ('{"sparsity": 0.4} <think>{"sparsity": 0.3}', 0.3),  # starts with JSON, so nothing is taken for a thought
        ('set {x: 1} and {"sparsity": 0.4}', 0.4),
        ('{"sparsity": 0.3, oops} {"sparsity": 0.4}', 0.4),
        ('{"sparsity": "0.4"}', 0.4),
    ],
)
def test_json_is_found(text: str, sparsity: float) -> None:
    assert parse_plan(text).sparsity == sparsity


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "sparsity: is missing"),
        ("{'sparsity': 0.4}", "The JSON is broken: Expecting property name"),
        ('{"sparsity": 0.4', "The JSON is broken: Expecting ',' delimiter"),
        ('{"sparsity": 0.4, "adjustments": [{"selector": "a" "b"}, {"action": "protect"}]}', "The JSON is broken: "),
        ('{"sparsity": 0.4, "was": {"sparsity": 0.3}, oops}', "The JSON is broken: "),
        ('<think>{"sparsity": 0.4}', "There is no JSON object in the answer."),
        ('{"sparsity": 1' + "0" * 5_000 + "}", "sparsity: Infinity is no number"),
        ('{"sparsity": -Infinity}', "sparsity: -Infinity is no number"),
        ('{"sparsity": true}', "sparsity: Input should be less than 1, not true"),
        ('{"sparsity": null}', "sparsity: Input should be a valid number, not null"),
        ('{"a": ' * 5_000, "The JSON is broken: it is nested too deeply."),
        ('{"sparsity": 0.4, "reason": "\\ud800"}', "reason: "),
        ('{"sparsity": 0.3, "adjustments": [{"selector": "a", "action": "bounds", "high": 60}]}', "write 0.6"),
        ('{"sparsity": 0.3, "adjustments": [{"selector": "a", "action": "factor"}]}', "needs a factor"),
        ("x" * 1_000_001, "The answer is longer than 1,000,000 characters."),
    ],
)
def test_reason_helps(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_plan(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "piece", ["{", '{"', '{"a":', '{"a": [', '{"a": 1}', "a-", "<think>", "</think>", "sk-", "***", "\\", '{"a":"\\"']
)
def test_reading_is_linear(piece: str) -> None:
    text = piece * (300_000 // len(piece))
    start = time.perf_counter()
    redact(text)
    with pytest.raises(ValueError, match=r"."):
        parse_plan(text)
    assert time.perf_counter() - start < 5  # reading it quadratically takes over 20 s


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["two-sided", "kappa", "factor", "bounds", "protect", "45%", "*.v_proj", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["sparsity", "recipe", "adjustments", "reason", "selector", "action", "factor", "low", "high"]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
PLANS = st.builds(
    lambda sparsity, adjustments, reason: Plan(sparsity=sparsity, adjustments=adjustments, reason=reason),
    st.floats(0.01, 0.99),
    st.lists(
        st.fixed_dictionaries(
            {"selector": st.text(min_size=1, max_size=5), "action": st.just("factor"), "factor": st.floats(0.05, 20)}
        ),
        max_size=3,
    ),
    st.text(max_size=30),
)
SCRAPS = st.lists(
    st.sampled_from([*'{}[]",:\\', "<think>", "</think>", "```json\n", "NaN", '"sparsity": 0.4', "1e999", "\ud800"])
    | st.text(max_size=5)
    | JSON_VALUES.map(json.dumps)
    | PLANS.map(lambda plan: plan.model_dump_json()),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(SCRAPS | JSON_VALUES.map(json.dumps) | st.text())
def test_any_reply_gives_a_plan_or_a_clean_reason(text: str) -> None:
    plan, reason = read(text)
    if plan is not None:
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        assert 0 < plan.sparsity < 1
        return
    assert 0 < len(reason) <= 1_000
    assert len(reason.split("\n")) <= 11
    assert reason.encode()
    assert "pydantic" not in reason


def read(text: str) -> tuple[Plan | None, str]:
    try:
        return parse_plan(text), ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=100, deadline=None)
@given(PLANS, st.text(st.characters(exclude_characters="{}<>")), st.text(st.characters(exclude_characters="{}<>")))
def test_a_plan_in_prose_is_found(plan: Plan, before: str, after: str) -> None:
    assert parse_plan(f"{before}\n{plan.model_dump_json()}\n{after}") == plan
