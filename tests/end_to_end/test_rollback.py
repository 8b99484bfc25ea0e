"""Runs whose plans are made to hurt, planned over HTTP: what a rollback puts back, and what it leaves alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph.build import builder
from graph.config import RunConfig, read_config
from graph.persistence import open_saver, open_store
from graph.runs.directory import create_run
from graph.state import Input
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, let_go, read_events, read_state, read_summary, read_weights, same_bits
from tests.openai_server import OpenAIServer
from tools.workbench import open as workbench

MASKS_ALONE = {"method": "wanda", "refit": False, "allocation": "uniform"}
REFITTED = {"method": "two-sided", "refit": True}
# A quarter of 1024, 512 or 1536 weights is a whole number, so one layer can be made to change and no other.
GENTLE = {"sparsity": 0.25, "recipe": MASKS_ALONE, "reason": "a quarter everywhere"}
HURTFUL = {
    "sparsity": 0.31875,
    "recipe": MASKS_ALONE,
    "adjustments": [{"selector": "blocks 1 · *.down_proj", "action": "bounds", "low": 0.9375, "high": 0.9375}],
    "reason": "one layer pays for all",
}
BRUTAL = {"sparsity": 0.6, "recipe": MASKS_ALONE, "reason": "everything at once"}
SENSIBLE = {"sparsity": 0.6, "recipe": REFITTED, "reason": "the survivors repair it"}


def flags(model: Path, server: OpenAIServer, rounds: int, tau: float) -> list[str]:
    return [
        *("--model", str(model), "--planner", server.planner("scripted"), "--target-sparsity", "0.6", *TINY),
        *("--tau", str(tau), "--max-iterations", str(rounds), "--max-layer-sparsity", "0.95"),
        *("--planner-price-input", "2", "--planner-price-output", "8"),
    ]


def steps(model: Path, plans: list[dict[str, Any]], tau: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Drive a run in this directory node by node: (node, its update)."""
    with OpenAIServer(plans) as server:
        given = flags(model, server, len(plans), tau)
        names = [flag[2:].replace("-", "_") for flag in given[::2]]
        config: RunConfig = read_config(dict(zip(names, given[1::2], strict=True)), None)
        thread = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        create_run(Path("runs"), "run", config, thread)
        with open_saver(Path("runs")) as saver, open_store(Path("runs")) as store:
            app = builder().compile(checkpointer=saver, store=store)
            thread_of: Any = {"configurable": {"thread_id": thread}}
            for part in app.stream(Input(run="run"), thread_of, context=config, stream_mode="updates"):
                ((node, update),) = part.items()
                yield node, update


def copy_weights() -> dict[str, Tensor]:
    """Every parameter and buffer of the model that is loaded now."""
    (bench,) = workbench._open
    return {name: tensor.detach().clone() for name, tensor in bench.model.state_dict().items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name.removesuffix(".weight") for name in before if not same_bits(before[name], after[name])}


@pytest.mark.usefixtures("command")
def test_a_rollback_puts_every_weight_back_and_touches_only_what_differs(
    trained_llama: Path, written: list[str]
) -> None:
    kept: dict[str, Tensor] = {}
    hurt: dict[str, Tensor] = {}
    rollbacks = []
    for node, _ in steps(trained_llama, [GENTLE, HURTFUL, BRUTAL], tau=0.05):
        if node == "accept":
            kept = copy_weights()
        if node == "validate":
            hurt = copy_weights()
            written.clear()
        if node == "rollback":
            assert not differing(kept, copy_weights())
            assert set(written) == differing(kept, hurt) and len(written) == len(set(written))
            rollbacks.append(set(written))
    assert rollbacks[0] == {"model.layers.1.mlp.down_proj"}
    assert len(rollbacks[1]) == 14
    assert [event["layers"] for event in read_events(Path("runs/run"), "rollback")] == [1, 14]
    assert kept, "the gentle plan was accepted"


@pytest.mark.usefixtures("command")
def test_a_rollback_before_anything_was_accepted_puts_the_dense_model_back(trained_llama: Path) -> None:
    for node, _ in steps(trained_llama, [BRUTAL], tau=0.02):
        if node == "profile":
            dense = copy_weights()
        if node == "rollback":
            assert not differing(dense, copy_weights())
            break
    else:
        pytest.fail("the brutal plan was not rolled back")
    let_go()


def test_a_plan_that_was_rolled_back_leaves_no_trace_in_the_model(
    trained_llama: Path, tmp_path: Path, command: Command
) -> None:
    models = {}
    for name, plans in {"good": [GENTLE, SENSIBLE], "hurt": [GENTLE, BRUTAL, SENSIBLE]}.items():
        with OpenAIServer(plans) as server:
            given = flags(trained_llama, server, len(plans), tau=0.35)
            assert command("--name", name, "--runs-dir", f"runs-{name}", *given).code == 0
        models[name] = read_weights(tmp_path / f"runs-{name}" / name / "model")
    good, hurt = read_summary(tmp_path / "runs-good" / "good"), read_summary(tmp_path / "runs-hurt" / "hurt")
    assert (good["rollbacks"], hurt["rollbacks"]) == (0, 1)
    assert good["achieved_sparsity"] == hurt["achieved_sparsity"] == pytest.approx(0.6, abs=5e-4)
    assert not differing(models["good"], models["hurt"])
    assert good["mask_sha256"] == hurt["mask_sha256"]
    assert all(torch.isfinite(tensor).all() for tensor in models["hurt"].values())


def test_tokens_and_cost_are_recorded_and_shown(trained_llama: Path, tmp_path: Path, command: Command) -> None:
    with OpenAIServer([GENTLE, BRUTAL]) as server:
        done = command("--name", "run", *flags(trained_llama, server, 2, tau=0.05))
    assert done.code == 0
    sent = [request.prompt_tokens for request in server.requests]
    answered = [request.completion_tokens for request in server.requests]
    run = tmp_path / "runs" / "run"
    replies = read_events(run, "reply")
    assert [reply["input_tokens"] for reply in replies] == sent
    assert [reply["output_tokens"] for reply in replies] == answered
    usage = read_events(run, "usage")[-1]
    cost = (2 * sum(sent) + 8 * sum(answered)) / 1e6
    assert (usage["calls"], usage["input_tokens"], usage["output_tokens"]) == (2, sum(sent), sum(answered))
    assert usage["cost"] == pytest.approx(cost)
    assert f"agents: 2 calls, {sum(sent):,} tokens in, {sum(answered):,} out, ${cost:.4f}" in done.out
    assert re.search(r"^trial 2: rollback, .* is above ", done.out, re.MULTILINE)
    assert re.search(r"^rollback 2: 14 layers restored to checkpoint ", done.out, re.MULTILINE)
    assert read_state(run).usage.cost == pytest.approx(cost)
