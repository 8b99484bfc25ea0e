"""Losses on named texts: means by weight, paired errors of the sum, and each text for itself."""

import math

import numpy as np
import pytest

from tools.measure.recall import list_texts
from tools.results.losses import Evaluation, compare_kl, find_likelihood_better, join_windows

TEXTS = ["code"] * 3 + ["prose"] * 3
WEIGHTS = {"code": 0.75, "prose": 0.25}
OURS = [0.1, 0.2, 0.3, 1.0, 1.2, 1.7]
THEIRS = [0.2, 0.25, 0.25, 1.1, 1.4, 1.6]


def losses(kl: list[float], texts: list[str] = TEXTS, weights: dict[str, float] = WEIGHTS) -> Evaluation:
    return Evaluation(nll=[10 * x for x in kl], kl=list(kl), texts=list(texts), weights=dict(weights))


def error(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def test_figures_are_means_over_texts_by_weight() -> None:
    found = losses(OURS)
    assert found.mean_kl == pytest.approx(0.75 * 0.2 + 0.25 * 1.3, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(0.75 * 2 + 0.25 * 13), rel=1e-12)
    assert found.kl_error == pytest.approx(math.hypot(0.75 * error(OURS[:3]), 0.25 * error(OURS[3:])), rel=1e-12)


def test_a_comparison_is_paired_within_each_text() -> None:
    change, noise = compare_kl(losses(OURS), losses(THEIRS))
    differences = [a - b for a, b in zip(OURS, THEIRS, strict=True)]
    assert change == pytest.approx(0.75 * np.mean(differences[:3]) + 0.25 * np.mean(differences[3:]), rel=1e-12)
    assert noise == pytest.approx(math.hypot(0.75 * error(differences[:3]), 0.25 * error(differences[3:])), rel=1e-12)
    better = find_likelihood_better(losses(OURS), losses(THEIRS))
    assert 0.5 < better < 1 and better == pytest.approx(1 - find_likelihood_better(losses(THEIRS), losses(OURS)))
    with pytest.raises(ValueError, match="same windows"):
        compare_kl(losses(OURS), losses(THEIRS, TEXTS[::-1]))


def test_alike_texts_have_the_degrees_of_freedom_of_both() -> None:
    twice, nothing = [0.1, 0.2, 0.4] * 2, [0.0] * 6
    found = find_likelihood_better(losses(nothing, weights={"code": 0.5, "prose": 0.5}), losses(twice))
    # t of the mean of both, with 2 + 2 degrees of freedom: scipy.stats.t.cdf(0.7 / 3 / (error / sqrt(2)), 4)
    t = (0.7 / 3) / (error(twice[:3]) / math.sqrt(2))
    assert found == pytest.approx(0.5 + 0.5 * (t / math.sqrt(4 + t**2)) * (1 + 2 / (4 + t**2)), rel=1e-9)


def test_one_text_and_one_that_counts_are_as_without_names() -> None:
    plain, theirs = Evaluation(nll=OURS, kl=OURS), Evaluation(nll=THEIRS, kl=THEIRS)
    one, other = losses(OURS, ["code"] * 6, {"code": 1.0}), losses(THEIRS, ["code"] * 6, {"code": 1.0})
    assert (one.mean_kl, one.perplexity, one.kl_error) != (None, None, None)
    assert one.mean_kl == plain.mean_kl and one.kl_error == plain.kl_error
    assert compare_kl(one, other) == compare_kl(plain, theirs)
    assert find_likelihood_better(one, other) == find_likelihood_better(plain, theirs)
    counts = losses(OURS).weigh({"prose": 1.0})
    alone = losses(OURS).take_text("prose")
    assert counts.weights == {"code": 0.0, "prose": 1.0} and counts.mean_kl == alone.mean_kl
    assert (alone.texts, alone.kl) == ([], OURS[3:])


def test_without_names_nothing_more_is_written() -> None:
    assert Evaluation(nll=[1.0], kl=[0.5]).model_dump() == {"nll": [1.0], "kl": [0.5]}
    again = Evaluation.model_validate_json(losses(OURS).model_dump_json())
    assert again == losses(OURS)


def test_some_windows_and_joined_ones_keep_their_texts() -> None:
    part = losses(OURS).take([0, 4])
    assert (part.kl, part.texts, part.weights) == ([0.1, 1.2], ["code", "prose"], WEIGHTS)
    joined = join_windows(part, losses(OURS).take([1]))
    assert (joined.texts, joined.mean_kl) == (["code", "prose", "code"], pytest.approx(0.75 * 0.15 + 0.25 * 1.2))
    assert losses(OURS).take([1]).mean_kl == 0.2, "of those texts that have windows"
    with pytest.raises(ValueError, match="1 windows with a text, but 2 with a KL"):
        Evaluation(nll=[1.0, 1.0], kl=[0.0, 0.0], texts=["code"])


def test_what_is_not_finite_has_no_mean_but_that_of_other_texts() -> None:
    found = losses(OURS)
    broken = found.model_copy(update={"kl": [None, *found.kl[1:]]})
    assert (broken.mean_kl, broken.kl_error) == (None, None)
    code, prose = list_texts(broken, losses(THEIRS))
    assert (code.name, code.kl, code.change) == ("code", None, None)
    assert (prose.name, prose.weight, prose.kl) == ("prose", 0.25, pytest.approx(1.3))
    assert (prose.change, prose.change_error) == compare_kl(found.take_text("prose"), losses(THEIRS).take_text("prose"))
    assert list_texts(Evaluation(nll=[1.0], kl=[0.5])) == []
