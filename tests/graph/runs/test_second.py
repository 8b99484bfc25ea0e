from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graph.config import RunConfig
from graph.goals.schema import Brief
from graph.runs.second import LEAST_RISE, follow_cut, keep_brief, leave_caps, read_configs
from tools.base.errors import UserError
from tools.results.page.record import Trial
from tools.results.schema import TextFigures, Usage

SIZE, ZEROS = {"target_size": "0.8"}, {"target_sparsity": "0.5"}


@pytest.mark.parametrize(
    ("flags", "file", "both"),
    [
        (SIZE | ZEROS, "", True),
        ({"target_speed": "1.2"} | ZEROS, "", True),
        (SIZE | {"pattern": "2:4"}, "", True),
        (ZEROS, "target_size: 0.8", True),
        ({}, "target_size: 0.8\ntarget_sparsity: 0.5", True),
        (SIZE, "", False),
        (ZEROS, "", False),
        (ZEROS | {"target_size": "0"}, "", False),
        (ZEROS | {"align": "16"}, "", False),
        (SIZE, "target_sparsity: 0.5", False),
        (SIZE, "target_size: 0.0\ntarget_sparsity: 0.5", False),
    ],
)
def test_zeros_are_asked_for_beside_a_cut(flags: dict[str, Any], file: str, both: bool, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(file or "tau: 0.3")
    first, second = read_configs(flags, path)
    assert (second is not None) == both
    if second:
        assert first.takes_parts and not second.takes_parts and second.target_sparsity == 0.5
        assert first.target_sparsity == RunConfig().target_sparsity, "which a size comes to is not known yet"


def test_what_is_of_zeros_alone_goes_to_the_second_and_of_cuts_to_the_first() -> None:
    given = {"polish_tokens": "1024", "protect": "blocks 0", "reprofile": True, "align": "32", "window": "64"}
    first, second = read_configs(SIZE | ZEROS | given, None)
    assert second is not None
    assert (first.polish_tokens, first.protect, first.reprofile, first.align, first.window) == (0, [], False, 32, 64)
    assert (second.polish_tokens, second.protect, second.reprofile, second.window) == (1024, ["blocks 0"], True, 64)
    assert second.align == RunConfig().align


def test_without_zeros_what_is_of_them_alone_is_refused() -> None:
    with pytest.raises(UserError, match="target_size takes whole parts away, and protect names layers"):
        read_configs(SIZE | {"protect": "blocks 0"}, None)


def test_caps_and_what_must_be_known_hold_of_both_runs_together(tmp_path: Path) -> None:
    usage = Usage(input_tokens=700, output_tokens=200, cost=0.75)
    trial = Trial(
        iteration=2, sparsity=0.2, perplexity=9.0, kl=0.1, predicted_kl=0.1, verdict="accept", fact_retention=0.9
    )
    cut = SimpleNamespace(summary=SimpleNamespace(agents=usage), kept=trial)
    first = RunConfig(target_size=0.8, max_agent_tokens=1000, max_agent_cost=1.0, workers="2", memory=False)
    second = RunConfig(target_sparsity=0.5, questions="file:q.jsonl", min_fact_retention=0.72)
    found = follow_cut(second, first, cut, tmp_path)  # type: ignore[arg-type]
    assert (found.max_agent_tokens, found.max_agent_cost, found.workers, found.memory) == (100, 0.25, "2", False)
    assert found.min_fact_retention == pytest.approx(0.8) and found.model == str(tmp_path)
    assert leave_caps({"max_agent_tokens": 5000, "workers": "", "max_agent_cost": 0.0}, cut) == {  # type: ignore[arg-type]
        "max_agent_tokens": 4100
    }, "as of a cap that is given when both are gone on with"
    spent = SimpleNamespace(summary=SimpleNamespace(agents=Usage(input_tokens=5000, cost=2.0)), kept=None)
    found = follow_cut(second, first, spent, tmp_path)  # type: ignore[arg-type]
    assert found.max_agent_tokens == 1 and 0 < found.max_agent_cost < 1e-6, "no cap would be 0"
    assert found.min_fact_retention == 0.72


def test_what_a_text_may_lose_it_loses_once(tmp_path: Path) -> None:
    def measure(code: float, prose: float | None) -> Trial:
        texts = [TextFigures(name=name, weight=0.5, perplexity=p, kl=0.1, kl_error=0.0) for name, p in
                 (("code", code), ("prose", prose))]  # fmt: skip
        return Trial(iteration=1, sparsity=0.2, perplexity=9.0, kl=0.1, predicted_kl=0.1, verdict="accept", texts=texts)

    def bound(dense: Trial | None, kept: Trial | None, **bounds: float) -> dict[str, float]:
        texts = {name: f"file:{name}.txt" for name in ("code", "prose")}
        second = RunConfig.model_validate({"target_sparsity": 0.5, "text": texts, "text_bounds": bounds})
        cut = SimpleNamespace(summary=SimpleNamespace(agents=Usage()), dense=dense, kept=kept)
        return follow_cut(second, RunConfig(target_size=0.8), cut, tmp_path).text_bounds  # type: ignore[arg-type]

    dense = measure(10.0, 20.0)
    assert bound(dense, measure(11.0, 20.0), code=0.21, prose=0.1) == pytest.approx({"code": 0.1, "prose": 0.1})
    assert bound(dense, measure(12.5, None), code=0.2, prose=0.1) == pytest.approx({"code": LEAST_RISE, "prose": 0.1})
    assert bound(None, None, code=0.2) == {"code": pytest.approx(0.2)} and bound(dense, dense) == {}


def test_the_second_run_goes_by_what_the_first_made_of_the_goal() -> None:
    texts = {name: f"file:{name}.txt" for name in ("code", "prose")}
    second = RunConfig.model_validate({"target_sparsity": 0.5, "text": texts, "goal": "Code must stay."})
    aims = [{"name": "code", "weight": 3, "max_rise": 0.2}, {"name": "prose", "weight": 1}]
    brief = Brief.model_validate({"aims": aims, "reason": "Code comes first."})
    kept = keep_brief(second, brief)
    assert (kept.goal, kept.text_weights, kept.text_bounds) == ("", {"code": 3, "prose": 1}, {"code": 0.2})
    assert keep_brief(second, None) == second
    writing = second.model_copy(update={"goal_tokens": 5000})
    assert keep_brief(writing, brief) == writing
