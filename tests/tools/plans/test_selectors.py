"""Which layers a selector means; and no text, however hostile, does harm."""

import contextlib

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.profiles import KINDS, check_sentence, make_layers
from tools.base.errors import ImpossiblePlan
from tools.plans.layer_profile import select_layers


def names(*pairs: tuple[int, str]) -> list[str]:
    return [f"model.layers.{block}.{kind}" for block, kind in pairs]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("*.v_proj", names((0, KINDS[1]), (1, KINDS[1]))),
        ("v_proj", names((0, KINDS[1]), (1, KINDS[1]))),
        ("self_attn.q_proj", names((0, KINDS[0]), (1, KINDS[0]))),
        ("model.layers.1.*", names(*((1, kind) for kind in KINDS))),
        ("blocks 0-0", names(*((0, kind) for kind in KINDS))),
        ("block 1", names(*((1, kind) for kind in KINDS))),
        ("blocks 0-1 · *.v_proj", names((0, KINDS[1]), (1, KINDS[1]))),
        ("  blocks 1,7 *.q_proj ", names((1, KINDS[0]))),
        ("blocks 0, 1: mlp.up_proj", names((0, KINDS[2]), (1, KINDS[2]))),
        ("blocks 1-999999 · mlp.*", names((1, KINDS[2]), (1, KINDS[3]))),
        ("*.v_proj; blocks 0 · *.q_proj", names((0, KINDS[0]), (0, KINDS[1]), (1, KINDS[1]))),
        ("blocks 0;blocks 0", names(*((0, kind) for kind in KINDS))),
        ("*[qv]_proj", names((0, KINDS[0]), (0, KINDS[1]), (1, KINDS[0]), (1, KINDS[1]))),
    ],
)
def test_selectors(selector: str, chosen: list[str]) -> None:
    assert select_layers(selector, make_layers(blocks=2)) == chosen


@pytest.mark.parametrize(
    ("selector", "sentence"),
    [
        ("", "is not a glob such as"),
        ("*.v_proj;", "selector '' is not a glob such as"),
        ("*.v_proj; *.x_proj", "selector ' \\*.x_proj' means no layer"),
        ("*.v_proj,*.q_proj", "globs are set apart by ';'"),
        ("*.v_proj and *.q_proj", "is not a glob such as"),
        ("blocks 0--3", "'0--3' is not a range of blocks such as 0-3"),
        ("blocks 0-9999999", "'0-9999999' is not a range of blocks"),
        ("blocks 3-0", "means no layer"),
        ("blocks 50", "means no layer"),
        ("layers.0", "means no layer"),
    ],
)
def test_selectors_that_mean_nothing(selector: str, sentence: str) -> None:
    with pytest.raises(ImpossiblePlan, match=sentence):
        select_layers(selector, make_layers(blocks=2))


@given(st.text(max_size=200) | st.text("blocks 0-9,·:*?[]!^.(){}\\|+$\n", max_size=200))
def test_no_text_is_more_than_refused(selector: str) -> None:
    layers = make_layers(blocks=1)
    try:
        chosen = select_layers(selector, layers)
    except ImpossiblePlan as refusal:
        check_sentence(refusal)
    else:
        assert chosen and set(chosen) <= {layer.name for layer in layers}


@pytest.mark.parametrize(
    "selector",
    [
        "blocks " + ",".join(["0-999999"] * 20),
        "blocks " + "0 " * 96 + "x y",
        "blocks 0" + " ,-" * 60 + "·x y",
        "*a" * 99 + "b",
        "[" * 200,
        "[!-" * 60,
    ],
)
def test_hostile_selectors_end(selector: str) -> None:
    layers = make_layers(blocks=10)
    with contextlib.suppress(ImpossiblePlan):
        select_layers(selector, layers)
