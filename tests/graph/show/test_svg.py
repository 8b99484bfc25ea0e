"""A recording becomes the last picture of its live display."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from graph.show.svg import render_svg
from tests.graph.show.shown import (
    NASTY,
    PLAN,
    RESULT_LINES,
    RUN,
    START,
    TAME,
)


def test_render_svg_draws_the_last_picture_of_a_recording(tmp_path: Path) -> None:
    recorded = [{"time": 100.0 + i, **json.loads(json.dumps(event))} for i, event in enumerate(RUN)]
    recorded.insert(3, {"time": 102.5, "type": "prompt", "text": "not shown"})
    render_svg(recorded, tmp_path / "a.svg")
    render_svg(recorded, tmp_path / "b.svg", width=80)
    text = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext()).replace("\xa0", " ")
    for line in RESULT_LINES:
        assert line[:60] in text
    assert "elapsed 0:05:01" in text
    assert "not shown" not in text
    assert text.count("warning: fused experts are left alone") == 1
    again = tmp_path / "again.svg"
    render_svg(recorded, again)
    assert again.read_bytes() == (tmp_path / "a.svg").read_bytes()


def test_render_svg_survives_nasty_text(tmp_path: Path) -> None:
    render_svg([START, PLAN | {"reason": NASTY + "<&>"}], tmp_path / "a.svg")
    text = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext()).replace("\xa0", " ")
    assert TAME + "<&>" in text
