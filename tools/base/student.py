"""Student's t distribution, for whole degrees of freedom: how surely a mean over few seeds or windows is no chance."""

import math

CONFIDENCE = 0.95
"""Of every interval that is shown; a difference counts where its p is below 1 - CONFIDENCE."""


def find_p(t: float, degrees: int) -> float:
    """The two-sided p of a t: how often a mean this many standard errors away from 0, or further, comes by chance.

    By the finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if math.isinf(t):
        return 0.0
    angle = math.atan2(abs(t), math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    within = math.sin(angle) * total
    return 1.0 - (2 / math.pi * (angle + within) if odd else within)


def find_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors the two-sided interval of this confidence reaches to either side."""
    low, high = 0.0, 1.0
    while find_p(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if find_p(middle, degrees) > 1 - confidence else (low, middle)
    return high
