"""Arms that are runs of the graph: the options that each is started with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graph.ablation.graph_arms import run_graph
from graph.ablation.settings import AblateSettings
from graph.config import RunConfig
from graph.run import make_parser
from tests.benches import ignore
from tools.base.errors import UserError
from tools.base.options import parse_flags, read_options

GOAL = AblateSettings(
    text={"code": "pydoc", "prose": "pydoc"},
    goal="Python must stay.",
    judge={"code": 1, "prose": 0},
    planner="exchange:asked",
)


@pytest.mark.parametrize(("arm", "tokens"), [("chat", 20_000), ("heuristic", 0), ("told", 0)])
def test_flags_about_a_goal_are_for_arms_that_are_told_it(
    arm: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(returncode=2, stdout="", stderr="error: no")

    monkeypatch.setattr("graph.ablation.graph_arms.subprocess.run", run)
    with pytest.raises(UserError, match=rf"^{arm}, seed 0: no; or choose another --out$"):
        run_graph(arm, GOAL.model_copy(update={"out": str(tmp_path)}), ["--tau", "3", "--goal-tokens", "20000"], ignore)
    _, flags = parse_flags(make_parser(), RunConfig, asked[0][3:])
    config = read_options(RunConfig, flags, None)
    assert (config.goal_tokens, config.tau, bool(config.goal)) == (tokens, 3, arm == "chat")
