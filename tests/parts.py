"""A model of four blocks whose parts can go, made up for tests of how a cut is shared out."""

from tests.profiles import make_profile
from tools.plans.cuts import Parts, Shape, Units
from tools.plans.layer_profile import LayerProfile

SHAPE = Shape(
    blocks=4,
    block_cost=7680,
    heads=Units(units=2, cost=1536, options=[0, 1]),
    neurons=Units(units=48, cost=96, options=list(range(0, 48, 8))),
)
LEVELS = [0.1, 0.2, 0.3, 0.45, 0.6]


def make_layers() -> list[LayerProfile]:
    """Four blocks of 7,680 weights: 3,072 of attention, 4,608 of the MLP."""
    return [
        make_profile(block, kind, weights, LEVELS)
        for block in range(4)
        for kind, weights in (("self_attn.o_proj", 3072), ("mlp.down_proj", 4608))
    ]


def make_parts(heads: float = 1.0) -> Parts:
    """A group of heads costs `heads`, eight neurons 0.1 and twice as much each time; blocks go from the last."""
    layers = make_layers()
    return Parts(
        shape=SHAPE,
        target=0.3,
        artifact="parts",
        heads=[[0.0, heads]] * 4,
        neurons=[[0.0, 0.1, 0.3, 0.7, 1.5, 3.1]] * 4,
        order=[3, 1],
        dropped_kl=[0.5, 2.0],
        head_layers=[[layers[2 * block].name] for block in range(4)],
        neuron_layers=[[layers[2 * block + 1].name] for block in range(4)],
    )
