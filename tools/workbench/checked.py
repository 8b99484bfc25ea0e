"""Whether Billhook can run a model block by block, and which of its layers it prunes: found out once in a directory."""

import importlib.metadata
from collections.abc import Sequence

from torch import Tensor

from tools.base.settings import WorkbenchSettings
from tools.models.blocks import Blocks, Look, check_blocks
from tools.models.experts import check_experts
from tools.models.layers import Layer
from tools.models.linear import keep_linear
from tools.models.readout import check_readout
from tools.workbench.store import Index

_RUN_BY = ("billhook", "torch", "transformers")
"""Packages of which another version may run a model otherwise."""


def check_once(
    index: Index, settings: WorkbenchSettings, blocks: Blocks, layers: Sequence[Layer], ids_T: Tensor
) -> tuple[list[Layer], list[str]]:
    """As `keep_linear`, of a model that has its dense weights, checked beforehand.

    What was found is kept in the `index`, for whoever resumes: of a model that is streamed it takes eight reads of all
    its weights. Whether they are still the same ones is `refuse_changed`'s to say. Raises UserError for an architecture
    that is not supported.
    """
    versions = [importlib.metadata.version(package) for package in _RUN_BY]
    key = ["checked", settings.model, settings.dtype, str(blocks.model.device), *versions]
    by_name = {layer.name: layer for layer in layers}
    found = index.read_measured(key)
    if found is None or "look" not in found or not by_name.keys() >= set(found["layers"]):
        check_readout(blocks.model, ids_T)
        check_blocks(blocks, ids_T)
        check_experts(blocks.model, ids_T)
        kept, told = keep_linear(blocks, layers, ids_T)
        found = index.keep_measured(
            key, {"layers": [layer.name for layer in kept], "told": told, "look": blocks.look(ids_T)}
        )
    blocks.recall(Look(*found["look"]))
    return [by_name[name] for name in found["layers"]], found["told"]
