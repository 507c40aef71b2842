"""k-means on a weighted histogram against scikit-learn's KMeans on the raw values.

    python benchmarks/histogram_kmeans.py                       # defaults below
    python benchmarks/histogram_kmeans.py --peer 100000 --own 10000000 --clusters 16

Prints, for sizes that KMeans finishes, CPU seconds of both and the ratio of their squared errors
(below 1: the histogram's is smaller); then CPU seconds of the histogram k-means on large weights,
with the peer's time extrapolated linearly from its largest size. Both start from the same evenly
spaced centroids, the peer runs until it is at rest (``tol=0``, at most 300 steps). The weights are
float32 and drawn from a Laplacian; one thread.
"""

import argparse
import time

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from onnxslim_passes.numerics.clustering import kmeans_1d
from onnxslim_passes.numerics.distortion import sqnr_db, squared_error

Floats = npt.NDArray[np.float32]

_CHUNK = 1 << 20


def laplacian(size: int, seed: int = 0) -> Floats:
    """`size` numbers, made chunk by chunk, so that float64 never holds all of them."""
    rng = np.random.default_rng(seed)
    values = np.empty(size, np.float32)
    for start in range(0, size, _CHUNK):
        part = values[start : start + _CHUNK]
        part[:] = rng.laplace(0, 0.05, part.size)
    return values


def peer(values: Floats, clusters: int) -> tuple[float, float]:
    """CPU seconds and squared error of scikit-learn on the raw values."""
    start = np.linspace(values.min(), values.max(), clusters)[:, None]
    model = KMeans(clusters, init=start, n_init=1, tol=0, max_iter=300)
    begin = time.process_time()
    model.fit(values[:, None])
    return time.process_time() - begin, float(model.inertia_)


def own(values: Floats, clusters: int) -> tuple[float, float, float]:
    """CPU seconds, squared error and SQNR in dB of the histogram k-means, assignment included."""
    begin = time.process_time()
    book = kmeans_1d(values, clusters)
    seconds = time.process_time() - begin
    restored = book.values()
    return seconds, squared_error(values, restored), sqnr_db(values, restored)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--own", type=int, nargs="*", default=[10_000_000, 100_000_000])
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 256])
    arguments = parser.parse_args()
    with threadpool_limits(1):
        for clusters in arguments.clusters:
            print(f"\n{clusters} clusters")
            print(f"{'weights':>12}  {'KMeans s':>10}  {'ours s':>8}  {'times':>7}  error ratio")
            rate = 0.0
            for size in sorted(arguments.peer):
                values = laplacian(size)
                peer_s, peer_error = peer(values, clusters)
                own_s, own_error, _ = own(values, clusters)
                rate = peer_s / size
                ratio = own_error / peer_error
                times = peer_s / own_s
                print(f"{size:>12,}  {peer_s:>10.2f}  {own_s:>8.3f}  {times:>6.0f}x  {ratio:.5f}")
            for size in sorted(arguments.own):
                own_s, _, sqnr = own(laplacian(size), clusters)
                guess = f"~{rate * size:,.0f}" if rate else "-"
                times = f"~{rate * size / own_s:.0f}x" if rate else "-"
                print(f"{size:>12,}  {guess:>10}  {own_s:>8.3f}  {times:>7}  SQNR {sqnr:.2f} dB")


if __name__ == "__main__":
    main()
