"""P(better): a paired comparison, window by window."""

import pytest

from tools.results.losses import Evaluation, find_likelihood_better, join_windows


def losses(*kl: float) -> Evaluation:
    return Evaluation(nll=[1.0] * len(kl), kl=list(kl))


def test_better_is_the_paired_t_test() -> None:
    """Beside scipy.stats.ttest_rel(..., alternative="less")."""
    trial, accepted = losses(0.1, 0.2, 0.14, 0.3), losses(0.12, 0.19, 0.2, 0.33)
    assert find_likelihood_better(trial, accepted) == pytest.approx(0.9091549430918953, rel=1e-12)


def test_without_any_spread_the_sign_decides() -> None:
    first, second = losses(0.25, 0.5), losses(0.5, 0.75)
    assert [find_likelihood_better(*pair) for pair in ((first, second), (second, first), (first, first))] == [1, 0, 0.5]


def test_windows_are_joined_in_order() -> None:
    joined = join_windows(losses(0.1), losses(0.2, 0.3), losses(0.4))
    assert (joined.kl, len(joined.nll)) == ([0.1, 0.2, 0.3, 0.4], 4)
