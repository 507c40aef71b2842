"""The optimum of 1-D k-means by the plainest dynamic programming, O(K n^2)."""

import numpy as np


def exact_distortion(values, clusters, fixed=None):
    """The least squared error of `clusters` centroids, one of them at `fixed` unless None."""
    points = np.sort(values.astype(np.float64))
    count = points.size
    ones, first, second = (np.concatenate([[0.0], np.cumsum(points**power)]) for power in (0, 1, 2))
    begin, end = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    weight = np.maximum(ones[end] - ones[begin], 1)
    cost = second[end] - second[begin] - (first[end] - first[begin]) ** 2 / weight
    cost[begin >= end] = np.where(begin == end, 0.0, np.inf)[begin >= end]
    plain = np.full(count + 1, np.inf)
    plain[0] = 0.0
    # best[u]: with the fixed centroid still to come (0) or used (1).
    best = [plain, np.full(count + 1, np.inf)]
    at_fixed = None
    if fixed is not None:
        shift = ones * fixed**2 - 2 * fixed * first + second
        at_fixed = np.where(begin <= end, shift[end] - shift[begin], np.inf)
    for _ in range(clusters):
        following = [np.min(best[used][:, None] + cost, axis=0) for used in (0, 1)]
        if at_fixed is not None:
            following[1] = np.minimum(following[1], np.min(best[0][:, None] + at_fixed, axis=0))
        best = following
    return best[0][-1] if fixed is None else best[1][-1]
