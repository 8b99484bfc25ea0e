"""The strip has a cell for every layer."""

import re

import pytest

from graph.show.strip import shade
from tests.graph.show.shown import draw, draw_segments, make_console, make_layers, show_live


def test_a_layer_that_cannot_be_coloured_is_shown_as_it_is() -> None:
    event = make_layers(1, ["mlp.up_proj"], float("nan"))
    assert "type=layers names=['model.layers.0.mlp.up_proj']" in show_live(make_console(), event)


def count_cells(lines: list[str]) -> int:
    return sum(len(re.findall(r"4", line.split("proj ")[1])) for line in lines if "_proj " in line and "%" not in line)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("blocks", [2, 30, 36, 58, 400])
def test_every_layer_has_a_cell(width: int, blocks: int) -> None:
    lines = draw(make_layers(blocks), width=width, last=True)
    assert count_cells(lines) == blocks * 7
    assert max(map(len, lines)) <= width


def test_400_layers_of_one_kind_wrap_by_blocks() -> None:
    lines = draw(make_layers(400, ["mlp.up_proj"]), width=80, height=50)
    assert count_cells(lines) == 400
    assert [line.split()[1] for line in lines if "block " in line] == ["0", "72", "144", "216", "288", "360"]


def test_kinds_are_told_apart_and_experts_share_a_cell() -> None:
    kinds = ["attn.c_proj", "mlp.c_proj", *(f"mlp.experts.{i}.up" for i in range(64))]
    text = "\n".join(draw(make_layers(3, kinds)))
    assert "attn.c_proj 4  4  4" in text
    assert " mlp.c_proj 4  4  4" in text
    assert "       *.up 4  4  4" in text


def test_untouched_layers_and_gaps() -> None:
    event = make_layers(3, ["a", "b"])
    event["sparsity"][0] = 0.0
    for key in ("names", "blocks", "kinds", "sparsity"):
        event[key].pop()
    lines = [line.rstrip() for line in draw(event)]
    assert "    a ·  4  4" in lines
    assert "    b 4  4" in lines


def test_too_many_kinds_are_counted() -> None:
    text = "\n".join(draw(make_layers(2, [f"k{'abcdefghijklmnopqrstuvw'[i]}" for i in range(20)]), width=120))
    assert "4 kinds not shown" in text


def test_colours_read_in_order_by_lightness_alone() -> None:
    grey = []
    for hundredths in range(101):
        colour = shade(hundredths).bgcolor
        assert colour is not None
        assert colour.triplet is not None
        red, green, blue = colour.triplet
        grey.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    assert grey == sorted(grey)
    assert len(set(grey)) == 101


def test_cells_are_coloured_by_sparsity() -> None:
    segments = draw_segments(make_layers(1, ["a"], 0.2), make_layers(1, ["a"], 0.8))
    assert shade(80).bgcolor in [s.style.bgcolor for s in segments if s.style and s.text == "   "]
