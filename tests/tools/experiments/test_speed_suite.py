"""Benchmarks whose figures are parts of one another."""

import pytest

from tools.experiments.speed import Site
from tools.experiments.speed_suite import BENCHMARKS


def test_parts_add_up(site: Site) -> None:
    whole, squares, masks, moments, published, score = BENCHMARKS["wanda"](site)
    assert score.name == "wanda/score"
    assert published.seconds == whole.seconds
    assert whole.seconds == [a + b for a, b in zip(squares.seconds, masks.seconds, strict=True)]
    assert whole.reference_seconds == squares.reference_seconds == masks.reference_seconds == moments.reference_seconds
    results = {result.name: result for result in BENCHMARKS["refit"](site)}
    model = results["obs/model"]
    assert model.seconds == results["refit/model/obs"].reference_seconds
    assert model.reference_seconds == results["refit/model/published"].reference_seconds
    times = {"32x32": 4, "16x32": 4, "48x32": 4, "32x48": 2}  # seven layers in each of two blocks
    for reference in ("obs", "published"):
        for key in ("seconds", "reference_seconds"):
            rounds = [[n * s for s in getattr(results[f"refit/{x}/{reference}"], key)] for x, n in times.items()]
            expected = [sum(parts) for parts in zip(*rounds, strict=True)]
            assert getattr(results[f"refit/model/{reference}"], key) == pytest.approx(expected)
