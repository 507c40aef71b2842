"""Runs one command and writes what it used: a small process, with nothing but the standard library.

    python -I -S launcher.py TIMEOUT_S LOG COST.json COMMAND...

A child starts with its parent's resident memory as its peak (Linux keeps the high-water mark of
the address space that `exec` replaces). A parent of 300 MB would hide every smaller tool, so that
tools are started from here; the floor is then this interpreter, about 10 MB.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Waits for the command; its exit code goes into the file, not into this one's."""
    timeout_s, log, cost, *command = sys.argv[1:]
    late = threading.Event()
    with open(log, "wb") as stream:  # noqa: PTH123  # pathlib would only add memory
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        timer = threading.Timer(float(timeout_s), _end, (child.pid, late))
        timer.start()
        # wait4 is asked for this one child; RUSAGE_CHILDREN would do as long as there is one.
        _, status, usage = os.wait4(child.pid, 0)
        timer.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)
    figures = {
        "cpu_s": _cpu_s(usage),
        "maxrss": usage.ru_maxrss,
        "exit_code": child.returncode,
        "late": late.is_set(),
    }
    with open(cost, "w") as stream:  # noqa: PTH123
        json.dump(figures, stream)


def _end(pid: int, late: threading.Event) -> None:
    late.set()
    os.kill(pid, signal.SIGKILL)


def _cpu_s(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
