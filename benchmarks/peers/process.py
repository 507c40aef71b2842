"""Runs one command in a process of its own and says what it cost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_KIB_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is KiB on Linux, bytes on macOS
_LAUNCHER = Path(__file__).resolve().with_name("launcher.py")


@dataclass(frozen=True)
class Cost:
    """What a process used.

    Attributes:
        cpu_s: CPU seconds, user and system, of all its threads.
        peak_mb: largest resident memory in MB.
        failure: why it failed, one line; empty if it did not.
    """

    cpu_s: float
    peak_mb: float
    failure: str = ""


def run(
    command: Sequence[str | Path],
    log: Path,
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Cost:
    """Runs `command` and waits for it.

    Args:
        command: program and arguments.
        log: takes what it prints; its figures go beside it.
        timeout_s: seconds on the clock after which it is ended.
        environment: variables added to those of this process.

    Raises:
        subprocess.CalledProcessError: the program does not exist.
    """
    cost = log.with_suffix(".json")
    small = [sys.executable, "-I", "-S", _LAUNCHER, str(timeout_s), log, cost]
    variables = {**os.environ, **(environment or {})}
    subprocess.run([str(word) for word in (*small, *command)], env=variables, check=True)
    figures = json.loads(cost.read_text())
    failure = ""
    if figures["late"]:
        failure = f"ended after {timeout_s:.0f} s"
    elif figures["exit_code"]:
        failure = _reason(figures["exit_code"], log)
    return Cost(figures["cpu_s"], figures["maxrss"] * _KIB_UNIT / 1e6, failure)


def _reason(exit_code: int, log: Path) -> str:
    """The last exception that the log names, else its last line, or the signal."""
    if exit_code < 0:
        return signal.Signals(-exit_code).name
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # Messages may have several lines; the first one names the exception.
    starts = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Fail"))]
    last = (starts or lines or [f"exit code {exit_code}"])[-1]
    return " ".join(last.split())
