"""Models laid over two devices, both of which are the CPU."""

from typing import Any

import accelerate

from tools.models.layers import find_blocks


def split(model: Any) -> dict[str, int]:
    """A part of the device map: the first block and all around the blocks on 0, the other block and what follows on 1.

    The head stays on 0, so that hidden states have to come back to it.
    """
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
    places = {name: int("norm" in name or name.endswith("ln_f")) for name in leaves if not name.startswith(prefix)}
    return places | {f"{prefix}.{i}": int(i > 0) for i in range(len(blocks))}


def lay_over(model: Any) -> Any:
    """The model with accelerate's hooks, as one laid over two devices has; both are the CPU."""
    return accelerate.dispatch_model(model, dict.fromkeys(split(model), "cpu"), main_device="cpu", force_hooks=True)
