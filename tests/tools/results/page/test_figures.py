"""Columns and labels of the figures."""

from tools.results.page.figures import Prediction, group_near, name_columns


def test_kinds_too_many_for_columns_are_taken_together() -> None:
    assert name_columns(["a.q", "b.k"]) == ({"a.q": "a.q", "b.k": "b.k"}, ["q", "k"])
    assert name_columns(["a.q", "b.q"])[1] == ["a.q", "b.q"]
    experts = [f"experts.{i}.up" for i in range(30)]
    names, labels = name_columns([*experts, "q_proj"])
    assert set(names.values()) == {"experts.*.up", "q_proj"} and labels == ["up", "q_proj"]


def test_points_that_are_near_share_a_label() -> None:
    points = [Prediction(i, "accept", 0.1, kl, 0) for i, kl in enumerate((0.2, 0.21, 0.3), 1)]
    assert [[p.iteration for p in group] for group in group_near(points)] == [[1, 2], [3]]
