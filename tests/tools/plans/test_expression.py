"""Formulas for the factors of layers: what they come to, and what is refused."""

import math
import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.profiles import KINDS, check_sentence, make_layers, make_profile
from tools.base.errors import ImpossiblePlan
from tools.plans.expression import (
    FUNCTIONS,
    MAX_LENGTH,
    check_expression,
    evaluate_expression,
    list_columns,
    tidy_expression,
)
from tools.plans.recipe import LEAST_FACTOR, MOST_FACTOR

CURVE = [0.001, 0.002, 0.004, 0.008, 0.016]
LAYERS = [
    make_profile(block, kind, 100 * (1 + place), [scale * x for x in CURVE], wanda_z=block - 1.0, gradient_z=place)
    for block, scale in enumerate((1, 4, 1))
    for place, kind in enumerate(("self_attn.q_proj", "mlp.down_proj"))
]
LAYERS = [layer.model_copy(update={"peak": 0.5 if "down" in layer.kind else None}) for layer in LAYERS]
"""Two layers of each of three blocks; the middle one's curves are four times as high."""
SIX = 6
TOLD = (
    "there are numbers, columns, + - * / **, comparisons and exp, log, sqrt, abs, min, max, mean, where, clip, smooth"
)


def test_the_columns() -> None:
    columns = {name: values.tolist() for name, values in list_columns(LAYERS).items()}
    scale = [1, 1, 4, 4, 1, 1]
    assert columns == {
        "depth": [0, 0, 0.5, 0.5, 1, 1],
        "block": [0, 0, 1, 1, 2, 2],
        "wanda_z": [-1, -1, 0, 0, 1, 1],
        "grad_z": [0, 1] * 3,
        "peak": [0.0, 0.5] * 3,
        **{f"kl{level}": [s * x for s in scale] for level, x in zip((15, 30, 45, 60, 75), CURVE, strict=True)},
        "log_size": [math.log(100), math.log(200)] * 3,
        "self_attn": [1, 0] * 3,
        "q_proj": [1, 0] * 3,
        "mlp": [0, 1] * 3,
        "down_proj": [0, 1] * 3,
    }


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("2", [2] * SIX),
        ("1 + 2 * 3 - 4 / 8", [6.5] * SIX),
        ("-2 ** 2 + 5", [1] * SIX),
        ("+(1 + depth)", [1, 1, 1.5, 1.5, 2, 2]),
        ("1 + q_proj", [2, 1] * 3),
        ("1 + (self_attn == 1) * (block >= 1)", [1, 1, 2, 1, 2, 1]),
        ("1 + (0 < depth < 1)", [1, 1, 2, 2, 1, 1]),
        ("exp(wanda_z)", [math.exp(-1)] * 2 + [1] * 2 + [math.exp(1)] * 2),
        ("exp(log(kl60 / kl45))", [2] * SIX),
        ("sqrt(kl45 / mean(kl45))", [math.sqrt(0.5)] * 2 + [math.sqrt(2)] * 2 + [math.sqrt(0.5)] * 2),
        ("abs(wanda_z) + min(1, block, 2) + max(0, 1)", [2, 2, 2, 2, 3, 3]),
        ("smooth(kl45) / kl45", [2.5, 2.5, 0.5, 0.5, 2.5, 2.5]),
        ("where(down_proj, smooth(kl45) / kl45, 1)", [1, 2.5, 1, 0.5, 1, 2.5]),
        ("where(wanda_z > 0, 2 / wanda_z, 1)", [1, 1, 1, 1, 2, 2]),
        ("clip(block * 10, 0.5, 15)", [0.5, 0.5, 10, 10, 15, 15]),
        ("1000 * kl15 / kl15", [1] * SIX),
        ("kl15", [4 ** (-1 / 3)] * 2 + [4 ** (2 / 3)] * 2 + [4 ** (-1 / 3)] * 2),  # 1 to 4, whatever the unit
        ("10 ** (9 * depth)", [LEAST_FACTOR] * 2 + [1] * 2 + [MOST_FACTOR] * 2),
    ],
)
def test_what_a_formula_comes_to(text: str, factors: list[float]) -> None:
    assert check_expression(text) == text
    np.testing.assert_allclose(evaluate_expression(text, LAYERS), factors, rtol=1e-12)


def test_smoothing_is_over_the_blocks_that_have_the_kind() -> None:
    """In this model every other block has a mixer in place of its attention."""
    layers = [
        make_profile(block, "mixer.proj" if block % 2 else "attn.proj", 10, [value] * 5)
        for block, value in enumerate([1.0, 10.0, 3.0, 20.0, 8.0])
    ]
    smoothed = evaluate_expression("smooth(kl15)", [layers[i] for i in (4, 1, 0, 3, 2)])
    assert smoothed.tolist() == [5.5, 15, 2, 15, 4]


def test_parts_of_names_that_cannot_be_named_are_no_columns() -> None:
    odd = make_profile(0, "experts.3.class.w-1.kl15.exp.\uff57.w1", 10, CURVE)
    columns = list_columns([odd])
    assert list(columns)[-3:] == ["experts", "exp", "w1"]
    assert columns["kl15"].tolist() == [0.001]
    many = [make_profile(0, f"p{i}", 10, CURVE) for i in range(99)]
    assert len(list_columns(many)) == 11 + 40


def test_one_way_of_writing() -> None:
    assert tidy_expression(" exp( (0.30*wanda_z) )") == tidy_expression("exp(.3 *\twanda_z)") == "exp(0.3 * wanda_z)"
    assert tidy_expression("") == check_expression("") == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("'a'", f"\"''\" is not allowed in an expression; {TOLD}"),
        ("depth.real", f"'.' is not allowed in an expression; {TOLD}"),
        ("kl60[0]", f"'[]' is not allowed in an expression; {TOLD}"),
        ("depth // 2", f"'depth // 2' is not allowed in an expression; {TOLD}"),
        ("depth if q_proj else 1", f"'depth if q_proj else 1' is not allowed in an expression; {TOLD}"),
        ("q_proj and depth", f"'q_proj and depth' is not allowed in an expression; {TOLD}"),
        ("not depth", f"'not depth' is not allowed in an expression; {TOLD}"),
        ("1 in depth", f"'1 in depth' is not allowed in an expression; {TOLD}"),
        ("True", f"'True' is not allowed in an expression; {TOLD}"),
        ("1e999", f"'1e309' is not allowed in an expression; {TOLD}"),
        ("1_0", f"'1' is not allowed in an expression; {TOLD}"),
        ("1if 2else 3", f"'12' is not allowed in an expression; {TOLD}"),
        ("(depth, 1)", f"'(depth, 1)' is not allowed in an expression; {TOLD}"),
        ("open(depth)", f"'open(depth)' is not allowed in an expression; {TOLD}"),
        ("exp(depth)(1)", f"'exp(depth)(1)' is not allowed in an expression; {TOLD}"),
        ("max(*depth)", "max() takes 2 values or more, not 1"),
        ("max(1, *depth)", f"'*depth' is not allowed in an expression; {TOLD}"),
        ("exp(1, 2)", "exp() takes 1 value, not 2"),
        ("clip(depth, 1)", "clip() takes 3 values, not 2"),
        ("2 +", "expression '2 +' cannot be read: invalid syntax"),
        ("(" * 190 + "1", f"expression {'(' * 60!r} cannot be read: '(' was never closed"),
        ("-" * 190 + "1", "an expression has at most 100 parts, nested at most 20 deep"),
        ("not " * 49 + "1", "an expression has at most 100 parts, nested at most 20 deep"),
        ("1" + "+1" * 60, "an expression has at most 100 parts, nested at most 20 deep"),
        ("1" * 201, "an expression has at most 200 characters, not 201"),
    ],
)
def test_what_is_no_formula_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_expression(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k60", "'k60' is no column; there are depth, block, wanda_z, grad_z, peak, kl15, kl30, kl45, kl60, kl75, "
         "log_size, self_attn, q_proj, mlp, down_proj"),
        ("wanda_z", "model.layers.0.self_attn.q_proj has the factor -1, not a finite one above 0"),
        ("1 - (block == 1)", "model.layers.1.self_attn.q_proj has the factor 0, not a finite one above 0"),
        ("1 / (block - 2)**2", "model.layers.2.self_attn.q_proj has the factor inf, not a finite one above 0"),
        ("log(wanda_z)", "model.layers.0.self_attn.q_proj has the factor nan, not a finite one above 0"),
        ("1.5 ** (6 * block)", "an exponent is beyond -10 to 10"),
        ("9**9**9", "an exponent is beyond -10 to 10"),
        ("2 ** (0 / 0)", "an exponent is beyond -10 to 10"),
    ],
)  # fmt: skip
def test_what_these_layers_give_no_factor_is_refused_in_one_line(text: str, said: str) -> None:
    assert check_expression(text) == text
    with pytest.raises(ImpossiblePlan) as refused:
        evaluate_expression(text, LAYERS)
    assert str(refused.value) == f"expression: {said}"
    check_sentence(refused.value)


# --- whatever it says ------------------------------------------------------------------------------------------------

COLUMNS = st.sampled_from([*list_columns(make_layers()), "x", "__import__", "exp"])
NUMBERS = st.sampled_from(["0", "1", "2", ".5", "1e308", "1e-9", "-1", "99999999", "1e999", "1_0", "0x1"])
FORMULAS = st.recursive(
    COLUMNS | NUMBERS,
    lambda inner: (
        st.builds(lambda a, op, b: f"({a} {op} {b})", inner, st.sampled_from([*"+-*/<", "**", ">=", "==", "//"]), inner)
        | st.builds(
            lambda name, given: f"{name}({', '.join(given)})",
            st.sampled_from([*FUNCTIONS, *FUNCTIONS, "eval"]),
            st.lists(inner, min_size=1, max_size=3),
        )
        | inner.map(lambda a: f"-{a}")
    ),
    max_leaves=6,
)
SCRAPS = st.lists(st.sampled_from([*"()+-*/<>=.,'[]{}: \n\0", "**", "1", "lambda", "if", "depth", "exp(", "\ud800"]))
EVERYTHING = FORMULAS | FORMULAS | SCRAPS.map("".join) | st.text(max_size=20)
TRIES = int(os.environ.get("FUZZED_EXPRESSIONS", "300"))
"""FUZZED_EXPRESSIONS=10000 pytest tests/tools/plans/test_expression.py tries as many."""
FUZZED = make_layers(blocks=3)


@settings(max_examples=TRIES, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
@given(text=EVERYTHING)
def test_any_expression(text: str) -> None:
    try:
        check_expression(text)
        factors = evaluate_expression(text, FUZZED) if text else np.ones(len(FUZZED))
    except ValueError as refused:
        event("refused")
        said = str(refused)
    else:
        event("factors")
        check_factors(text, factors)
        return
    assert "\n" not in said and len(said) < 400
    said.encode()


def check_factors(text: str, factors: NDArray[np.float64]) -> None:
    """They are in the bounds, and the same however the formula is written."""
    assert len(text) <= MAX_LENGTH
    assert factors.shape == (3 * len(KINDS),)
    assert (factors >= LEAST_FACTOR).all() and (factors <= MOST_FACTOR).all()
    if text and len(tidy_expression(text)) <= MAX_LENGTH:
        again = tidy_expression(text)
        np.testing.assert_array_equal(evaluate_expression(again, FUZZED), factors)
