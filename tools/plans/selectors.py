"""Which layers a few words mean."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from tools.base.errors import ImpossiblePlan
from tools.plans.layer_profile import LayerProfile

MOST_SELECTOR = 200
"""Characters of a selector that a planner or an agent writes."""


def select_layers(selector: str, layers: Sequence[LayerProfile]) -> list[str]:
    """Names of the layers a selector means, in layer order.

    A selector is a glob over layer names (or a bare last name such as `v_proj`), optionally after a range of blocks:
    `*.v_proj`, `*.[qk]_proj`, `blocks 0-3`, `blocks 0-3,29 · *.v_proj`; or several of them, between semicolons, which
    means what any of them does. Raises ImpossiblePlan when one is not of that form or means no layer.
    """
    chosen = {name for part in selector.split(";") for name in _select_part(part, layers)}
    return [layer.name for layer in layers if layer.name in chosen]


def _select_part(selector: str, layers: Sequence[LayerProfile]) -> list[str]:
    form = re.fullmatch(r"\s*(?:blocks?\s+(?P<blocks>\d[\d\s,-]*))?\s*[·:]?\s*(?P<glob>\S*)\s*", selector)
    if form is None or not (form["blocks"] or form["glob"]):
        raise ImpossiblePlan(f"selector {selector[:80]!r} is not a glob such as '*.v_proj' or 'blocks 0-3 · *.v_proj'")
    blocks = _parse_blocks(form["blocks"]) if form["blocks"] else None
    glob = form["glob"] or "*"
    names = [
        layer.name
        for layer in layers
        if (blocks is None or any(layer.block in part for part in blocks))
        and any(fnmatchcase(text, glob) for text in (layer.name, layer.kind, layer.name.rsplit(".", 1)[-1]))
    ]
    if not names:
        problem = "globs are set apart by ';'" if "," in glob else f"layers are named like {layers[0].name!r}"
        raise ImpossiblePlan(f"selector {selector[:80]!r} means no layer; {problem}")
    return names


def _parse_blocks(text: str) -> list[range]:
    blocks = []
    for part in re.split(r"[,\s]+", text.strip(" ,")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if ends is None:
            raise ImpossiblePlan(f"{part!r} is not a range of blocks such as 0-3")
        blocks.append(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return blocks
