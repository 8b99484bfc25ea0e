"""What pruned weights lose on the text that they were fitted to, beside the text that they are judged by."""

import math

from tools.base.errors import ImpossiblePlan
from tools.instruments.comparisons import Figures, round_figure
from tools.instruments.functions import Round
from tools.plans.costs import count_fit
from tools.results.losses import Evaluation
from tools.workbench.store import DENSE


def measure_fit(round_: Round, number: int | None = None) -> Figures:
    """KL on calibration text beside KL on validation text, of the last accepted weights or those of round `number`.

    On as many calibration windows as half of the validation text has, or all of them, forward through the dense model
    and these weights; what was measured before is read back and costs nothing. A fit that went too far is good on
    calibration text alone; where layers act together in ways that KL curves do not see, KL is above them on both.
    `validation_minus_calibration` is the difference and its standard error, unpaired, for the texts differ. Raises
    ImpossiblePlan where nothing is pruned or a round's layers are gone, and ValueError where there are not the tokens
    or seconds.
    """
    bench, at_hand = round_.bench, round_.list_at_hand()
    if number is not None and number not in at_hand:
        told = ", ".join(map(str, sorted(at_hand))) or "none"
        raise ImpossiblePlan(f"the layers of round {number} are not at hand; rounds that are: {told}")
    checkpoint = round_.present if number is None else at_hand[number]
    if checkpoint == DENSE:
        raise ImpossiblePlan("nothing is pruned yet, and fit is that of pruned weights")
    cost = {f"fit of {checkpoint[:16]}": count_fit(bench.settings)}
    round_.admit([], 0, round_.count_new(cost))
    round_.spend("measuring the fit", cost)
    fitted = bench.evaluator.read_fit(checkpoint) or bench.measure_fit(checkpoint, round_.progress)
    with bench.weights.put_back():
        judged = bench.evaluate(checkpoint, "validation", round_.profile, round_.progress)
    figures: Figures = {"calibration": _describe(bench.settings.window, fitted)}
    figures["validation"] = _describe(bench.settings.window, judged)
    if fitted.mean_kl is not None and judged.mean_kl is not None:
        error = math.hypot(fitted.kl_error or 0.0, judged.kl_error or 0.0)
        gap = [round_figure(judged.mean_kl - fitted.mean_kl), round_figure(error)]
        figures["validation_minus_calibration"] = gap
    return figures


def _describe(window: int, losses: Evaluation) -> Figures:
    return {
        "tokens": len(losses.kl) * window,
        "kl": round_figure(losses.mean_kl),
        "kl_error": round_figure(losses.kl_error),
    }
