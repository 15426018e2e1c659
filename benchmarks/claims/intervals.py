"""Means with intervals, and paired comparisons: Student's t without a library of statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), 0 <= x <= 1, to about 1e-14.

    By its continued fraction, evaluated with Lentz's method (Press et al., Numerical Recipes, 6.4).
    """
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    factor = math.exp(logarithm + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return factor * value


def two_sided_p(t: float, degrees: int) -> float:
    """The probability that Student's t with so many degrees of freedom is at least |t| from 0."""
    return incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def t_quantile(confidence: float, degrees: int) -> float:
    """The t beyond which, on both sides together, 1 - confidence of the distribution lies."""
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if two_sided_p(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; half_width is infinite for a single value."""

    count: int
    mean: float
    half_width: float
    p: float = math.nan
    """Of the mean being 0, two-sided; NaN for a single value or where it was not asked for."""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean, its t-interval, and the t-test of its being 0: of paired differences, the paired
    t-test.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(1, mean, math.inf)
    squares = math.fsum((value - mean) ** 2 for value in values)
    error = math.sqrt(squares / (count - 1) / count)
    if error == 0.0:
        return Estimate(count, mean, 0.0, float(mean == 0.0))
    p = two_sided_p(mean / error, count - 1)
    return Estimate(count, mean, t_quantile(confidence, count - 1) * error, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method; NaN stays, uncounted."""
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted
