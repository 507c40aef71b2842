"""Measures the networks of this folder, as they are and after recipes.

    python models/measure.py [NAME ...] [--write]

For each network (default: all), the accuracy on its test data before and after each recipe that its
expected.json names, and the bytes of the file. `--write` stores the figures there; without it they
are compared with what is stored, and the exit code is 1 if one is worse than its tolerance allows.
Needs onnxslim_passes, none of the frameworks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxslim_passes import Pipeline, Recipe, Samples, load
from onnxslim_passes.evaluation import open_metric
from onnxslim_passes.runtime import open_session

HERE = Path(__file__).resolve().parent
CALIBRATION = HERE.parent / "calibration"


@dataclass(frozen=True)
class Figures:
    """Of one file: percent of test samples told right, and bytes."""

    top1: float
    file_bytes: int


def names() -> list[str]:
    """The networks: folders that hold an expected.json."""
    return sorted(path.parent.name for path in HERE.glob("*/expected.json"))


def expected(name: str) -> dict[str, Any]:
    """What expected.json of a network says."""
    about: dict[str, Any] = json.loads((HERE / name / "expected.json").read_text(encoding="utf-8"))
    return about


def data(spec: str) -> Samples:
    """Samples of the folder calibration: `digits.npz`, `waves` or `readers.py:waves`."""
    return Samples.open(f"{CALIBRATION}/{spec}")


def top1(path: Path, samples: Samples) -> float:
    """Percent of samples that the model in a file tells right."""
    return open_metric("top1", samples.labelled)(open_session(path))


def recipe(name: str, text: str) -> Recipe:
    """A ready recipe by its name, or a `.toml` file in the network's folder."""
    return Recipe.open(HERE / name / text if text.endswith(".toml") else text)


def measure(name: str, recipe_name: str | None = None) -> Figures:
    """The figures of a network, after a recipe if one is named."""
    path, about = HERE / name / "model.onnx", expected(name)
    tests = data(about["evaluation"])
    if recipe_name is None:
        return Figures(top1(path, tests), path.stat().st_size)
    pipeline = Pipeline(recipe(name, recipe_name).passes)
    result = pipeline.run(load(path), samples=data(about["calibration"]), measure=False)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.onnx"
        result.model.save(small)
        return Figures(top1(small, tests), small.stat().st_size)


def shortfalls(stored: dict[str, Any], found: Figures) -> list[str]:
    """In what the figures are worse than the stored ones; better is welcome.

    Accuracy may be lower by the stored tolerance, the file larger by 2 %.
    """
    if "top1" not in stored:
        return ["no figures stored yet; --write stores them"]
    problems = []
    if found.top1 < stored["top1"] - stored["tolerance"]:
        problems.append(f"top1 {stored['top1']} expected, tolerance {stored['tolerance']}")
    if found.file_bytes > 1.02 * stored["file_bytes"]:
        problems.append(f"{stored['file_bytes']} bytes expected")
    return problems


def report(name: str, *, write: bool) -> bool:
    """Prints the figures of a network, stores them if `write`; whether they are as expected."""
    about = expected(name)
    original = measure(name)
    fine = True
    rows = [("float", about["float"], original)]
    rows += [(text, stored, measure(name, text)) for text, stored in about["recipes"].items()]
    for text, stored, found in rows:
        problems = [] if write else shortfalls(stored, found)
        fine = fine and not problems
        ratio = original.file_bytes / found.file_bytes
        print(
            f"{name:28} {text:14} top1 {found.top1:6.2f}  {found.file_bytes:7} bytes  {ratio:5.2f}x"
            f"  {'; '.join(problems)}".rstrip()
        )
        stored.update(top1=round(found.top1, 4), file_bytes=found.file_bytes)
    if write:
        text = json.dumps(about, indent=2) + "\n"
        (HERE / name / "expected.json").write_text(text, encoding="utf-8")
    return fine


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description="Measures the networks of this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks, default: all")
    parser.add_argument("--write", action="store_true", help="store the figures")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names())
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    fine = [report(name, write=arguments.write) for name in arguments.names or names()]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
