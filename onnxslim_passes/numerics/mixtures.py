"""Gaussian mixtures of weighted points on a line, by expectation and maximization.

scikit-learn's `GaussianMixture` takes no weights of samples, so it would have to see every weight
of a tensor; a histogram of a few thousand points has the same mixture. The steps, the starting
clusters and the sense of `regularization` are its own, and the tests hold both to one likelihood.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_REGULARIZATION = 1e-6  # of a variance, as a fraction of that of all points
_MAX_STEPS = 300
_TOLERANCE = 1e-5  # of the mean log-likelihood between two steps


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """K normal distributions with shares.

    Attributes:
        shares: float64, shape (K,), > 0, sum 1.
        means: float64, shape (K,), ascending.
        variances: float64, shape (K,), > 0.
        log_likelihood: mean over the weighted points, natural logarithm.
    """

    shares: Floats
    means: Floats
    variances: Floats
    log_likelihood: float


def fit_mixture(points: Floats, weights: Floats, start: Floats) -> Mixture:
    """The mixture that EM reaches from clusters around `start`.

    Args:
        points: shape (P,), ascending, P >= 1.
        weights: shape (P,), > 0.
        start: shape (K,), ascending: points belong to the nearest at first. Those without points
            are left out, so that the mixture may have fewer components.

    Returns:
        The mixture, its means ascending.
    """
    weights = weights / weights.sum()
    mean = float(weights @ points)
    spread = float(weights @ (points - mean) ** 2)
    floor = max(_REGULARIZATION * spread, float(np.finfo(np.float64).tiny))
    nearest = np.searchsorted((start[1:] + start[:-1]) / 2, points)
    shares, sums, squares = _sums(nearest, points, weights, start.size)
    used = shares > 0
    mixture = _maximized(shares[used], sums[used], squares[used], floor, -math.inf)
    for _ in range(_MAX_STEPS):
        responsibilities, likelihood = _expected(points, weights, mixture)
        gained = likelihood - mixture.log_likelihood
        parts = responsibilities * weights
        # A component that no point belongs to keeps its place at a share that does not count.
        shares = np.maximum(parts.sum(axis=1), 1e-300)
        mixture = _maximized(shares, parts @ points, parts @ points**2, floor, likelihood)
        if gained < _TOLERANCE:
            break
    order = np.argsort(mixture.means, kind="stable")
    return Mixture(
        shares=mixture.shares[order],
        means=mixture.means[order],
        variances=mixture.variances[order],
        log_likelihood=mixture.log_likelihood,
    )


def _sums(
    nearest: npt.NDArray[np.int64], points: Floats, weights: Floats, count: int
) -> tuple[Floats, Floats, Floats]:
    terms = (weights, weights * points, weights * points**2)
    sums = [np.bincount(nearest, term, minlength=count).astype(np.float64) for term in terms]
    return sums[0], sums[1], sums[2]


def _maximized(
    shares: Floats, sums: Floats, squares: Floats, floor: float, likelihood: float
) -> Mixture:
    """M step, from the sums of the points, and of their squares, that belong to each component."""
    means = sums / shares
    variances = np.maximum(squares / shares - means**2, 0.0) + floor
    return Mixture(
        shares=shares / shares.sum(), means=means, variances=variances, log_likelihood=likelihood
    )


def _expected(points: Floats, weights: Floats, mixture: Mixture) -> tuple[Floats, float]:
    """E step: responsibilities (K, P), and the mean log-likelihood."""
    scale = np.log(mixture.shares) - 0.5 * np.log(2 * math.pi * mixture.variances)
    distances = (points - mixture.means[:, None]) ** 2 / (2 * mixture.variances[:, None])
    logs = scale[:, None] - distances
    largest = logs.max(axis=0)
    densities = np.exp(logs - largest)
    total = densities.sum(axis=0)
    return densities / total, float(weights @ (largest + np.log(total)))
