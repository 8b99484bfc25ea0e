"""How much goes of each kind: all that comes to the share, the least predicted, and blocks as long as KL falls."""

import pytest
import torch

from billhook_kernels.channels import Elimination
from tests.cuts import IDS, assert_same_logits, make_config, make_model
from tests.tiny import make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.models.layers import find_blocks
from tools.plans.cuts import Counts, list_counts
from tools.surgery.choose import measure_kl
from tools.surgery.parts import count_weights, find_parts, without_fits
from tools.surgery.rebuild import build_cut, check_cut
from tools.surgery.share import choose_by_curves, find_shape, predict_kl, search_lowest


def test_all_numbers_are_listed_that_come_to_the_share() -> None:
    model = make_model(make_config("llama", num_hidden_layers=4))  # 7,680 weights a block: 96 a neuron, 1,536 a group
    shape = find_shape(model)
    assert list_counts(shape, 0.3, 0) == [Counts(0, 24, 0), Counts(1, 8, 0)]
    assert list_counts(shape, 0.3, 1) == [Counts(0, 8, 1)]
    assert list_counts(shape, 0.25, 1) == [Counts(0, 0, 1)]
    assert list_counts(shape, 0.3, 2) == []
    assert list_counts(shape, 0.01, 0) == []


def test_predictions_are_sums_over_the_blocks_that_stay() -> None:
    def curve(*costs: float) -> Elimination:
        return Elimination(torch.arange(len(costs)), torch.tensor(costs, dtype=torch.float64))

    curves = {"heads": [curve(1), curve(2), curve(4)], "neurons": [curve(0.1, 0.3), curve(0.2, 0.5), curve(0.4, 0.9)]}
    assert predict_kl(curves, Counts(heads=1), []) == 7  # type: ignore[arg-type]
    assert predict_kl(curves, Counts(1, 2, 1), [1]) == pytest.approx(1 + 4 + 0.3 + 0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "measured", "best"),
    [
        # foreseen 4.0 and 4.0: the search sets out with the fewest
        ({0: 4.0, 1: 5.0}, [0, 1], 0),
        ({0: 4.0, 1: 3.0, 3: 3.5}, [0, 1, 3], 1),
        # foreseen 8.0, 7.2, 6.6, 6.8
        ({0: 8.0, 1: 7.5, 3: 7.0, 4: 7.1}, [0, 3, 4, 1], 3),
        ({0: 8.0, 1: 5.0, 3: 7.0, 4: 7.1}, [0, 3, 4, 1], 1),
        ({0: 8.0, 1: 9.0, 3: 9.0, 4: 9.0}, [0, 3, 4, 1], 0),
    ],
)
def test_the_search_sets_out_where_units_and_blocks_as_foreseen_cost_least(
    kl: dict[int, float], measured: list[int], best: int
) -> None:
    units, blocks = {0: 2.0, 1: 1.6, 3: 0.9, 4: 0.4}, {0: 0.0, 1: 0.8, 3: 3.0, 4: 5.2}
    seen = list[int]()

    def measure(number: int) -> float:
        seen.append(number)
        return kl[number]

    assert search_lowest([0, 1, 3, 4], lambda number: (units[number], blocks[number]), measure) == best
    assert seen == measured


def test_what_does_nothing_goes_of_every_kind_and_changes_nothing() -> None:
    model = make_model(make_config("llama", num_hidden_layers=4))
    for tensor in find_blocks(model)[2].parameters():
        tensor.zero_()
    for part in find_parts(model, "neurons"):
        weight = part.output.weight_OI.clone()
        weight[:, part.block :: 6] = 0
        part.output.write(weight)
    choice = choose_by_curves(model, 0.25 + 0.75 * 8 * 96 / 7680, IDS, ignore_progress)
    cut = choice.cut
    assert (cut.counts, cut.dropped) == (Counts(0, 8, 1), (2,))
    for fit in cut.fits:
        gone = {*range(48)} - {*fit.units.tolist()}
        assert gone == {*range(fit.part.block, 48, 6)}
    assert_same_logits(build_cut(model, cut), model)
    assert choice.constraint.startswith(
        "every block that stays loses the same number, those that the least KL is predicted for: 0 of 2 groups of "
        "heads and 8 of 48 neurons; whole blocks: 2; the number of blocks that costs the least KL on calibration text, "
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_cut_is_a_stock_model_that_the_refit_brings_nearer(architecture: str) -> None:
    model = make_model(make_config(architecture, num_hidden_layers=2))
    choice = choose_by_curves(model, 0.6, IDS, ignore_progress, lead=1)
    built = build_cut(model, choice.cut)
    check_cut(model, choice.cut, build_cut(model, without_fits(choice.cut)), IDS[0])
    kept = count_weights(built) / count_weights(model)
    assert abs(kept - 0.4) <= 0.05
    plain = choose_by_curves(model, 0.6, IDS, ignore_progress, refit=False, lead=1)
    assert all(fit.weight_OK is None for fit in plain.cut.fits)
    assert measure_kl(model, built, IDS) < measure_kl(model, build_cut(model, plain.cut), IDS)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"^0.001 of the weights cannot be removed here: "):
        choose_by_curves(make_tiny_model("llama"), 0.001, IDS, ignore_progress)


def test_heads_that_cannot_be_cut_stay() -> None:
    cut = choose_by_curves(make_tiny_model("gpt2"), 0.2, IDS, ignore_progress).cut
    assert cut.counts.heads == 0 and cut.counts.neurons > 0
