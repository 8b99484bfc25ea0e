"""The workbench's operations as LangChain tools, for agents and for anyone who binds them to a model.

Thin wrappers: each checks its arguments by schema, calls one plain function, and answers in JSON. They work on the
one open workbench, one after another; give ToolNode `{"max_concurrency": 1}`, since it runs calls in parallel.
"""

import json
from typing import Any

from langchain_core.tools import BaseTool, tool
from pydantic import BaseModel, Field

from tools.allocate import Allocation, allocate
from tools.profile import Progress
from tools.recipes import Adjustment, Recipe
from tools.workbench import Workbench


class AllocateArguments(BaseModel):
    """What an allocation is made from."""

    sparsity: float = Field(gt=0, lt=1, description="Share of all prunable weights to be zero, as a fraction.")
    recipe: Recipe = Field(default_factory=Recipe, description="How weights are chosen and shared out.")
    adjustments: list[Adjustment] = Field(default_factory=list, description="Corrections for groups of layers.")


class CheckpointArguments(BaseModel):
    """A checkpoint of the run."""

    checkpoint: str = Field(description="Id of a checkpoint that prune_model gave, or 'dense'.")


def make_tools(
    bench: Workbench, profile: str, progress: Progress, *, protect: list[str], max_layer_sparsity: float
) -> list[BaseTool]:
    """Tools over an open workbench and its profile; `protect` and `max_layer_sparsity` hold whatever a caller asks."""

    def share_out(sparsity: float, recipe: Recipe, adjustments: list[Adjustment]) -> Allocation:
        layers = bench.read_profile(profile).layers
        return allocate(layers, sparsity, recipe, adjustments, protect=protect, max_layer_sparsity=max_layer_sparsity)

    @tool(args_schema=AllocateArguments)
    def allocate_sparsity(sparsity: float, recipe: Recipe, adjustments: list[Adjustment]) -> str:
        """Share a sparsity out over the layers, exactly to the weight, and predict its KL; touches no weight."""
        allocation = share_out(sparsity, recipe, adjustments)
        layers = {name: round(zeros / bench.dense[name].numel(), 4) for name, zeros in allocation.zeros.items()}
        return _answer(sparsity=allocation.sparsity, predicted_kl=allocation.predicted_kl, layers=layers)

    @tool(args_schema=AllocateArguments)
    def prune_model(sparsity: float, recipe: Recipe, adjustments: list[Adjustment]) -> str:
        """Prune the model from its dense weights; the id of the checkpoint."""
        allocation = share_out(sparsity, recipe, adjustments)
        checkpoint = bench.prune(profile, allocation, recipe, progress)
        return _answer(checkpoint=checkpoint, sparsity=allocation.sparsity, predicted_kl=allocation.predicted_kl)

    @tool(args_schema=CheckpointArguments)
    def validate_model(checkpoint: str) -> str:
        """Perplexity and paired KL to the dense model, in nats per token, on the validation text."""
        evaluation = bench.evaluate(checkpoint, "validation", profile, progress)
        return _answer(
            perplexity=evaluation.perplexity,
            kl=evaluation.mean_kl,
            kl_error=evaluation.kl_error if evaluation.finite else None,
        )

    @tool(args_schema=CheckpointArguments)
    def restore_checkpoint(checkpoint: str) -> str:
        """Put a checkpoint's weights back, bit for bit; how many layers differed."""
        return _answer(checkpoint=checkpoint, changed_layers=len(bench.restore(checkpoint)))

    return [allocate_sparsity, prune_model, validate_model, restore_checkpoint]


def _answer(**figures: Any) -> str:
    return json.dumps(figures)
