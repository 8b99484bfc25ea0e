"""Run directories made up step by step, through the models that a run itself writes them with; no model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from graph.config import RunConfig
from graph.llm.ask import CallRecord
from graph.llm.toolbox import ToolRecord
from graph.planning.orders import describe_plan
from graph.planning.plan import Plan
from graph.reflecting.schema import Lesson
from graph.runs.directory import write_config
from tests.profiles import make_profile
from tools.base.files import write_json
from tools.base.rundir import FORMAT, append_event
from tools.plans.layer_profile import LayerProfile
from tools.results.schema import CutResult, Perplexities, Protocol, Reach, Summary
from tools.results.trial import Trial
from tools.workbench.store import ArtifactStore

KINDS = ("self_attn.q_proj", "mlp.up_proj")
PROTOCOL = Protocol(text="pydoc", tokens=4096, window=512, dtype="fp32", versions={"torch": "2.9.1", "python": "3.11"})

CUT = CutResult(
    **{"size": 0.8, "speed": None, "heads": 0, "neurons": 8, "blocks": [], "dense_parameters": 10, "parameters": 8},
    **{"dense_bytes": 100, "bytes": 81, "dense_decoded_per_second": 20.0, "decoded_per_second": 25.0},
)
"""What a cut to 0.8 of the bytes came to."""


def make_layers(blocks: int = 2, kinds: Sequence[str] = KINDS) -> list[LayerProfile]:
    """Layers of 1000 weights, the later ones the dearer."""
    return [
        make_profile(block, kind, 1000, [(1 + i + block) * c for c in (1e-4, 1e-3, 4e-3, 2e-2, 1e-1)])
        for block in range(blocks)
        for i, kind in enumerate(kinds)
    ]


def begin_run(directory: Path, layers: Sequence[LayerProfile] = (), perplexity: float = 20.0, **config: Any) -> Path:
    """A run that has profiled its model; without layers not even that. The directory."""
    directory.mkdir(parents=True)
    begun = RunConfig.model_validate({"model": "tiny", "target_sparsity": 0.45, **config})
    write_config(directory, begun)
    said = begun.model_dump(mode="json", exclude={"target_sparsity"} if begun.takes_parts else set())
    write_json(directory / "run.json", {"format": FORMAT, "config": said})
    append_event(directory, {"type": "start", "run": directory.name, "resumed": False})
    tell_node(directory, "profile", 0)
    if layers:
        stored = {"layers": [layer.model_dump() for layer in layers]}
        profile = ArtifactStore(directory / "artifacts").write_json(stored)
        append_event(directory, {"type": "profile", "profile": profile, "layers": len(layers), "weights": 1, "top": []})
        dense = Trial(
            **{"iteration": 0, "checkpoint": "dense", "sparsity": 0.0, "perplexity": perplexity, "kl": 0.0},
            **{"kl_error": 0.0, "predicted_kl": 0.0, "verdict": "accept", "reason": "the dense model", "plan": "dense"},
        )
        append_event(directory, {"type": "trial", **dense.model_dump()})
    return directory


def tell_node(directory: Path, node: str, iteration: int) -> None:
    append_event(directory, {"type": "node", "node": node, "iteration": iteration, "checkpoint": "1f", "came_from": ""})


def add_round(
    directory: Path,
    iteration: int,
    verdict: Literal["accept", "rollback", "refuse"],
    layers: Sequence[LayerProfile],
    *,
    sparsity: float = 0.3,
    perplexity: float | None = 21.0,
    kl: float | None = 0.1,
    kl_error: float | None = 0.01,
    predicted_kl: float = 0.08,
    facts: float | None = None,
    words: str = "as planned",
) -> None:
    """A round with a plan, a tool call, a reply, a trial and a lesson; `words` is what everybody says."""
    plan, checkpoint = Plan(sparsity=sparsity, reason=words), f"{iteration:064x}"
    tell_node(directory, "plan", iteration)
    call = ToolRecord(tool="inspect", arguments="{}", answer="", shown=words, seconds=1, calls_left=5, seconds_left=9)
    append_event(directory, {"type": "tool", "iteration": iteration, **call.model_dump()})
    reply = CallRecord(method="json_schema", reply=words, input_tokens=1200, output_tokens=34, seconds=1)
    append_event(directory, {"type": "reply", "planner": "openai:m", **reply.model_dump()})
    append_event(
        directory,
        {
            **{"type": "plan", "iteration": iteration, "planner": "openai:m", "plan": describe_plan(plan), "order": ""},
            **{"reason": plan.reason, "predicted_kl": predicted_kl, "details": plan.model_dump()},
        },
    )
    if verdict != "refuse":
        tell_node(directory, "prune", iteration)
        append_event(
            directory,
            {
                **{"type": "layers", "checkpoint": checkpoint, "names": [x.name for x in layers]},
                **{"blocks": [x.block for x in layers], "kinds": [x.kind for x in layers]},
                "sparsity": [round(sparsity + 0.05 * (-1) ** i, 6) for i in range(len(layers))],
            },
        )
    tell_node(directory, "validate", iteration)
    trial = Trial(
        **{"iteration": iteration, "checkpoint": checkpoint, "sparsity": sparsity, "perplexity": perplexity, "kl": kl},
        **{"kl_error": kl_error, "predicted_kl": predicted_kl, "verdict": verdict, "reason": f"because {words}"},
        **{"plan": describe_plan(plan), "recipe": plan.recipe, "seconds": 1.5},
        **{"fact_retention": facts, "fact_error": None if facts is None else 0.008},
    )
    append_event(directory, {"type": "trial", **trial.model_dump()})
    tell_node(directory, "reflect", iteration)
    lesson = Lesson(
        **{"run": directory.name, "iteration": iteration, "selector": "*.up_proj", "factor": 1.25, "predicted": 0.08},
        **{"measured": kl, "text": words, "source": "reflector"},
    )
    append_event(directory, {"type": "lesson", **lesson.model_dump()})


def end_run(directory: Path, **changes: Any) -> Summary:
    """Finish the run; its summary, with these changes."""
    append_event(directory, {"type": "note", "text": "2 iterations were asked for and done"})
    tell_node(directory, "finish", 2)
    summary = Summary.model_validate(
        {
            **{"run": directory.name, "model": "tiny", "status": "finished", "target_sparsity": 0.45},
            **{"achieved_sparsity": 0.45, "kl": 0.1, "plan": "45.0% refit:kappa", "iterations": 2, "rollbacks": 1},
            **{"reach": Reach(of_blocks=1.0, of_model=0.8, prunable=8000), "kept": 1},
            "perplexity": Perplexities(dense=20.0, pruned=22.0, uniform_wanda=25.0),
            "wanda_statistics": "sequential",
            **{"seconds": 301.2, "peak_memory_bytes": 1_500_000_000, "mask_sha256": "ab" * 32, "protocol": PROTOCOL},
            **changes,
        }
    )
    write_json(directory / "summary.json", summary.model_dump())
    return summary


def write_run(directory: Path, words: str = "as planned", **changes: Any) -> Path:
    """A finished run of two rounds, the second rolled back; its directory."""
    layers = make_layers()
    begin_run(directory, layers)
    add_round(directory, 1, "accept", layers, words=words)
    add_round(directory, 2, "rollback", layers, sparsity=0.45, perplexity=30.0, kl=0.4, words=words)
    end_run(directory, **changes)
    return directory
