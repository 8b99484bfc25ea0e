"""Evaluations of windows, their means and errors, and what is not finite."""

import math

import numpy as np
import pytest
import torch

from tests.tiny import VOCABULARY, make_tiny_model
from tools.base.progress import ignore_progress
from tools.measure.losses import evaluate_windows
from tools.models.layers import find_layers
from tools.models.readout import measure_losses
from tools.results.losses import Evaluation, compare_kl


def make_windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))


def test_windows_are_measured_one_by_one() -> None:
    model, windows = make_tiny_model("llama"), make_windows()
    seen: list[tuple[str, int, int]] = []
    dense, hidden = evaluate_windows(model, windows, None, "dense", lambda *step: seen.append(step))
    assert seen == [("dense", i, 3) for i in range(4)]
    assert hidden.shape == (3, 24, 32)
    for i, ids in enumerate(windows):
        losses, hidden_TD = measure_losses(model, ids, None)
        assert dense.nll[i] == pytest.approx(losses.nll / 23)
        assert torch.equal(hidden[i], hidden_TD)
    assert dense.kl == [0, 0, 0] and dense.finite
    assert dense.perplexity == pytest.approx(math.exp(np.mean([n for n in dense.nll if n is not None])))

    layer = find_layers(model)[0]
    layer.write(layer.weight_OI * 1.5)
    changed, _ = evaluate_windows(model, windows, hidden, "changed", ignore_progress)
    for i, ids in enumerate(windows):
        assert changed.kl[i] == pytest.approx(measure_losses(model, ids, hidden[i])[0].kl / 24)
    assert changed.mean_kl is not None and changed.mean_kl > 0


def test_the_beginning_of_the_sequence_counts_in_no_loss() -> None:
    """By hand, in float64: the same targets as without it, which the model now predicts from behind it."""
    model, text_BT = make_tiny_model("llama"), make_windows()
    windows = torch.nn.functional.pad(text_BT, (1, 0), value=7)

    def log_p(ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids_BT, use_cache=False).logits
        return logits.double().log_softmax(-1)

    dense, hidden = evaluate_windows(model, windows, None, "dense", ignore_progress, lead=1)
    assert hidden.shape == (3, 25, 32)
    dense_log_p = log_p(windows)
    expected = -dense_log_p[:, 1:-1].gather(2, text_BT[:, 1:, None]).mean((1, 2))
    assert dense.nll == pytest.approx(expected.tolist(), rel=1e-5)
    without, _ = evaluate_windows(model, text_BT, None, "dense", ignore_progress)
    assert without.nll != pytest.approx(expected.tolist(), rel=1e-2)

    layer = find_layers(model)[2]  # values, which the first token reads too
    layer.write(layer.weight_OI * 1.5)
    changed, _ = evaluate_windows(model, windows, hidden, "changed", ignore_progress, lead=1)
    kl = (dense_log_p.exp() * (dense_log_p - log_p(windows))).sum(-1)
    assert changed.kl == pytest.approx(kl[:, 1:].mean(1).tolist(), rel=1e-4)
    assert kl[:, 0].min() > 0, "there is something to leave out"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_stay_in_the_models_dtype(dtype: torch.dtype) -> None:
    evaluation, hidden = evaluate_windows(
        make_tiny_model("llama").to(dtype), make_windows(), None, "x", ignore_progress
    )
    assert hidden.dtype == dtype and evaluation.finite


def test_a_model_that_is_broken_is_not_finite() -> None:
    model, windows = make_tiny_model("llama"), make_windows()
    _, hidden = evaluate_windows(model, windows, None, "x", ignore_progress)
    layer = find_layers(model)[0]
    layer.write(layer.weight_OI * math.nan)
    evaluation, _ = evaluate_windows(model, windows, hidden, "x", ignore_progress)
    assert evaluation.nll == evaluation.kl == [None] * 3
    assert not evaluation.finite
    assert evaluation.perplexity is evaluation.mean_kl is evaluation.kl_error is None
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_means_and_standard_errors() -> None:
    evaluation = Evaluation(nll=[1.0, 3.0], kl=[0.1, 0.3])
    assert evaluation.perplexity == pytest.approx(math.exp(2))
    assert evaluation.mean_kl == pytest.approx(0.2)
    assert evaluation.kl_error == pytest.approx(np.std([0.1, 0.3], ddof=1) / math.sqrt(2))
    assert Evaluation(nll=[1.0], kl=[0.1]).kl_error == math.inf
    assert Evaluation(nll=[1e4], kl=[0.1]).perplexity is None
    one_missing = Evaluation(nll=[1.0, None], kl=[0.1, 0.2])
    assert one_missing.perplexity is None and not one_missing.finite and one_missing.mean_kl == pytest.approx(0.15)


def test_comparison_is_paired() -> None:
    first, second = Evaluation(nll=[1.0] * 3, kl=[0.2, 1.2, 2.3]), Evaluation(nll=[1.0] * 3, kl=[0.1, 1.1, 2.1])
    mean, error = compare_kl(first, second)
    assert mean == pytest.approx(0.4 / 3)
    assert error == pytest.approx(np.std([0.1, 0.1, 0.2], ddof=1) / math.sqrt(3))
    assert error < 0.1 * (first.kl_error or 0)  # that is what pairing is for


@pytest.mark.parametrize(
    "other", [Evaluation(nll=[1.0] * 2, kl=[0.1] * 2), Evaluation(nll=[1.0, 1.0, None], kl=[0.1] * 3)]
)
def test_what_cannot_be_compared(other: Evaluation) -> None:
    good = Evaluation(nll=[1.0] * 3, kl=[0.1] * 3)
    for pair in ((good, other), (other, good)):
        with pytest.raises(ValueError, match="only finite evaluations of the same windows can be compared"):
            compare_kl(*pair)
