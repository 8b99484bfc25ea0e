"""KL curves of several texts anew, where they are to count otherwise, from statistics that are known."""

from collections.abc import Sequence
from dataclasses import replace

from tools.base.progress import Progress, count_up
from tools.models.layers import Layer
from tools.statistics.collect import finish_curves, group_layers
from tools.statistics.known import ModelStatistics, mix_gamma, mix_tensors
from tools.statistics.passage import split_texts
from tools.statistics.requests import Extent, SumMaskCurves, Team, begin_walk, join_answers


def measure_text_curves(
    team: Team,
    extent: Extent,
    layers: Sequence[Layer],
    progress: Progress,
    parts: Sequence[ModelStatistics],
    shares: Sequence[float],
) -> list[ModelStatistics]:
    """What is known of each text, with KL curves about the masks of these `shares`, as `collect_texts` has it.

    The gradient windows of all texts walk up and down; nothing else is collected. In the model are the dense weights.
    """
    grouped, found = group_layers(layers), [replace(part, kappa={}) for part in parts]
    ticks = count_up(progress, "gradients", len(grouped) * extent.shards)
    unchanged = layers[0].weight_OI.new_empty(0)
    with begin_walk(team, shares=[1 / len(shares) for _ in shares]) as walk:
        for block in reversed(range(len(grouped))):
            known = {
                layer.name: (
                    unchanged,
                    mix_tensors([part.mean_square[layer.name] for part in parts], shares),
                    mix_gamma([part.gradient_square[layer.name] for part in parts], shares, extent.gradients),
                )
                for layer in grouped[block]
            }
            answers = team.ask(SumMaskCurves(walk, block, known))(ticks)
            for own, sums in zip(found, split_texts(join_answers(extent, answers), walk), strict=True):
                own.kappa |= finish_curves(sums, extent, grouped[block])
    return found
