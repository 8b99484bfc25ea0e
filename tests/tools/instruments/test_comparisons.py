"""Which probes one is told beside, and how far."""

from typing import Any

import pytest

from tools.instruments import comparisons
from tools.instruments.comparisons import compare_probes
from tools.instruments.probed import PastProbe, Probed


def make_probed(kl: float, alone: str = "") -> Probed:
    losses = {"nll": [1.0, 2.0], "kl": [kl, kl + 0.5]}
    more = {"tokens": 128, "losses": losses, "windows": [0, 1], "line": "plan", "alone": alone}
    return Probed.model_validate({"order": f"{kl} {alone}", "checkpoint": "c", "sparsity": 0.4} | more)


def make_past(number: int, kl: float, *, best: bool = True) -> PastProbe:
    kept = {"windows": [0, 1], "losses": {"nll": [1.0, 2.0], "kl": [kl, kl + 0.5]}} if best else {}
    told = {"iteration": number, "plan": "p", "tokens": 128, "kl": kl, "kl_error": 0.1, "change": None}
    return PastProbe.model_validate({"number": number, "change_error": None} | told | kept)


@pytest.mark.parametrize(
    ("most", "beside"),
    [
        (24, ["5", "6", "7", "8", "9", "11", "12", "13"]),
        (8, ["6", "7", "8", "9", "11", "12", "13"]),
        (4, ["8", "9", "12", "13"]),
        (2, ["9", "13"]),
        (1, ["13"]),
        (0, []),
    ],
)
def test_half_of_the_room_is_for_the_best_of_earlier_rounds(
    most: int, beside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "MOST_DIFFERENCES", most)
    monkeypatch.setattr(comparisons, "MOST_EARLIER", 5 if most == 24 else 4)
    past = [make_past(number, 1.0, best=number != 4) for number in range(1, 10)]
    probed = [make_probed(kl) for kl in (0.4, 0.3, 0.2, 0.1)]
    told: dict[str, Any] = {}
    compare_probes(probed, past, 0, told)
    assert told.pop("probe") == 10
    assert list(told.get("kl_minus_probe", {})) == beside
    if "13" in beside:
        assert told["kl_minus_probe"]["13"] == [pytest.approx(0.3), pytest.approx(0, abs=1e-9)]


def test_what_pruned_other_layers_is_no_measure() -> None:
    probed = [
        make_probed(0.4),
        make_probed(0.01, "*.q_proj"),
        make_probed(0.02, "*.v_proj"),
        make_probed(0.03, "*.q_proj"),
    ]
    for own, beside in ((0, ["1"]), (1, ["5"]), (2, []), (3, ["3"])):
        told: dict[str, Any] = {}
        compare_probes(probed, [make_past(1, 1.0)], own, told)
        assert list(told.get("kl_minus_probe", {})) == beside
