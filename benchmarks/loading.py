"""What loading and running a file costs: each load in a fresh process, files in turn."""

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxslim_passes.runtime import open_session

_LOADER = """
import sys, time
import onnxruntime
def peak_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
before = peak_kb()
start = time.process_time()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
cpu = time.process_time() - start
print(cpu, (peak_kb() - before) / 1000)
"""


@dataclass(frozen=True)
class Load:
    """Creating a session of a file, on one thread.

    Attributes:
        cpu_s: CPU seconds, system time included.
        peak_mb: by how much the memory of the process grew at most, in 10^6 bytes.
    """

    cpu_s: float
    peak_mb: float


def measure_loads(files: Mapping[str, Path], runs: int) -> dict[str, Load]:
    """Each file loaded so many times in fresh processes, in turn: the best of each."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for _ in range(runs):
        for name, path in files.items():
            command = [sys.executable, "-c", _LOADER, str(path)]
            cpu_s, peak_mb = subprocess.check_output(command, text=True).split()
            found[name].append((float(cpu_s), float(peak_mb)))
    return {name: Load(*map(min, zip(*each, strict=True))) for name, each in found.items()}


def measure_runs(files: Mapping[str, Path], feed: Mapping[str, Any], runs: int) -> dict[str, float]:
    """Median seconds of one run of each file, in turn."""
    sessions = {name: open_session(path) for name, path in files.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for session in sessions.values():
        session.run(feed)
    for _ in range(runs):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(feed)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}
