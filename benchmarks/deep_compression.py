"""Deep Compression (Han et al. 2016) from the ONNX file alone: LeNet-300-100 and LeNet-5.

    python benchmarks/deep_compression.py [NAME...] [--seeds 0 1 2] [--folder ../shared/models]

Each network goes through the command line with the recipe in `deep_compression/`, once for each
seed; the recipe sees the training images only, and each result is tested once. Bytes are those of
the plain ONNX file, which stock ONNX Runtime runs. `--keep FOLDER` keeps the files, and what is
there already is measured, not made again; training that was done, or killed, goes on from there,
too. The paper has 40x and 39x in a container of its own.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
RECIPES = HERE / "deep_compression"
FOLDER = HERE / "../../shared/models"
COMMAND = "import sys; from onnxslim_passes.cli import main; sys.exit(main())"
GOALS = {"lenet300": 80, "lenet5": 150}
ALLOWED_POINTS = 0.1


@dataclass(frozen=True)
class Result:
    """One compressed network.

    Attributes:
        seed: of the run.
        size_bytes: of the file.
        error: percent of the test images.
        seconds: CPU time of the command; None if the file was there.
    """

    seed: int
    size_bytes: int
    error: float
    seconds: float | None


def test_error(path: Path, folder: Path) -> float:
    """Percent of the 10,000 test images that are recognised wrongly."""
    with np.load(folder / "data" / "mnist_test.npz") as data:
        images, digits = data["x"][:, None].astype(np.float32) / 256, data["y"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[i : i + 500]})[0] for i in range(0, len(images), 500)]
    return float(100 * (np.concatenate(parts).argmax(axis=1) != digits).mean())


def compress(name: str, seed: int, folder: Path, out: Path) -> float:
    """Runs the command line; CPU seconds."""
    command = [
        *(sys.executable, "-c", COMMAND),
        *("compress", str(folder / "models" / f"{name}.onnx"), "-o", str(out)),
        *("--recipe", str(RECIPES / f"{name}.toml")),
        *("--training", f"{RECIPES / 'mnist.py'}:training", "--seed", str(seed)),
        *("--checkpoints", str(out.parent / "checkpoints")),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"MODELS": str(folder.resolve())}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(name: str, seed: int, folder: Path, keep: Path) -> Result:
    """Makes a file, unless it is there, and tests it."""
    out = keep / f"{name}_{seed}.onnx"
    seconds = None if out.exists() else compress(name, seed, folder, out)
    return Result(seed, out.stat().st_size, test_error(out, folder), seconds)


def report(name: str, seeds: list[int], folder: Path, keep: Path) -> None:
    """Prints the lines of one network."""
    original = folder / "models" / f"{name}.onnx"
    original_bytes, allowed = original.stat().st_size, test_error(original, folder)
    print(f"{name:10} float {original_bytes:>10,} {'1.0x':>8} {allowed:>9.2f}")
    results = []
    for seed in seeds:
        found = measure(name, seed, folder, keep)
        results.append(found)
        ratio = f"{original_bytes / found.size_bytes:.1f}x"
        seconds = "" if found.seconds is None else f"{found.seconds:.0f}"
        line = f"{name:10} {seed:>5} {found.size_bytes:>10,} {ratio:>8} {found.error:>9.2f}"
        print(f"{line} {seconds:>7}", flush=True)
    ratio = original_bytes / statistics.median(one.size_bytes for one in results)
    error = statistics.mean(one.error for one in results)
    met = ratio >= GOALS[name] and error <= allowed + ALLOWED_POINTS
    print(
        f"{name}: median ratio {ratio:.1f}x (goal {GOALS[name]}x), mean error {error:.2f} "
        f"(allowed {allowed + ALLOWED_POINTS:.2f}): {'met' if met else 'not met'}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(GOALS)}; default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--keep", type=Path, help="folder for the files")
    options = parser.parse_args()
    for name in options.names:
        if name not in GOALS:
            parser.error(f"unknown network {name!r}; expected {' or '.join(GOALS)}")
    print(f"{'network':10} {'seed':>5} {'bytes':>10} {'ratio':>8} {'error %':>9} {'CPU s':>7}")
    with tempfile.TemporaryDirectory() as temporary:
        keep = options.keep or Path(temporary)
        keep.mkdir(parents=True, exist_ok=True)
        for name in options.names or GOALS:
            report(name, options.seeds, options.folder, keep)


if __name__ == "__main__":
    main()
