"""Gradients of every operator against finite differences, on all of ONNX's node tests.

    python -m benchmarks.gradient_coverage            # from the root of the repository
    python -m benchmarks.gradient_coverage --check    # prints only; writes nothing

Prints the operators with cases that fail, and the share that passes; writes the table of operators
in docs/training-operators.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import onnx
import onnxruntime
from rich.progress import track

from onnxslim_passes.training.gradients.restrictions import RESTRICTIONS
from onnxslim_passes.training.gradients.rules import RULES, STOPS
from tests.training.gradients.cases import LISTED, STRAIGHT_THROUGH, gradient_cases

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training-operators.md"

HEAD = """# Operators with gradients

Written by `python -m benchmarks.gradient_coverage` (onnx {onnx}, onnxruntime {runtime}).

`train-graph` and `fine-tune` differentiate a model operator by operator. *Rule* is a gradient rule
in `onnxslim_passes/training/gradients`; *body* means that the operator is replaced by the function
body that the ONNX standard defines it with, and that is differentiated. Other operators with a
function body work the same way. *Cases* are ONNX's node tests of the operator with floating-point
data that ONNX Runtime {runtime} can run: passed / all. A case passes if the gradient of all its
inputs agrees with central differences along random directions, to 1e-6 in double precision, or
where ONNX Runtime has only single precision kernels to 5e-3, relative to the sum of the absolute
terms. Together {passed} of {total} cases pass ({share:.1%}).

An operator that is not here and has no function body ends with an error that names the node, before
any training; with `--freeze-unsupported` its inputs are constants to training.

| Operator | By | Cases | Restrictions |
|---|---|---|---|
"""

STOP_HEAD = """
## Operators where gradients end

Their outputs do not change, or only in jumps, when their inputs change a little:
"""

NO_CASES = "tests of its own"


def measure() -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Passed and all cases by operator, and what the cases that fail say."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    failures = {}
    cases = [case for case in gradient_cases() if case.operator in LISTED]
    for case in track(cases, "cases", transient=True):
        if not case.runs():
            continue
        reason = case.verdict()
        if reason:
            failures[case.name] = reason
        passed, total = counts[case.operator]
        counts[case.operator] = (passed + (not reason), total + 1)
    return counts, failures


def page(counts: dict[str, tuple[int, int]]) -> str:
    """The text of the page."""
    passed, total = (sum(pair[index] for pair in counts.values()) for index in (0, 1))
    head = HEAD.format(
        onnx=onnx.__version__,
        runtime=onnxruntime.__version__,
        passed=passed,
        total=total,
        share=passed / total,
    )
    rows = []
    for operator in sorted(LISTED | STRAIGHT_THROUGH):
        cases = "{} / {}".format(*counts[operator]) if operator in counts else NO_CASES
        kind = "rule" if operator in RULES else "body"
        rows.append(f"| {operator} | {kind} | {cases} | {RESTRICTIONS.get(operator, '')} |\n")
    stops = ", ".join(sorted(STOPS))
    return f"{head}{''.join(rows)}{STOP_HEAD}{stops}.\n"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    counts, failures = measure()
    for name, reason in failures.items():
        print(f"{name}: {reason}")
    passed, total = (sum(pair[index] for pair in counts.values()) for index in (0, 1))
    print(f"{passed} of {total} cases of {len(counts)} operators pass ({passed / total:.1%})")
    if not arguments.check:
        PAGE.write_text(page(counts), encoding="utf8")


if __name__ == "__main__":
    main()
