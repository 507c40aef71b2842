"""Guards: limits on drop, speed and size that a result must keep, or it is not written."""

import dataclasses
from typing import Annotated

from cyclopts import Group, Parameter

from onnxslim_passes.cli.task import TaskResult
from onnxslim_passes.errors import GuardError, UsageError
from onnxslim_passes.report.wording import times_text

__all__ = ["Guards", "check_guards"]

_GROUP = Group("Guards (not met: exit code 4, nothing is written)", sort_key=3)


@Parameter(name="*", group=_GROUP)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
    """What a result must keep.

    Attributes:
        max_drop: Largest drop of --metric, in its own unit. Where it is not kept, the layers that
            cost most get more bits or go back to float, as few as will do.
        require_speedup: Smallest ratio of latencies, original to result.
        require_ratio: Smallest ratio of file sizes, original to result.
    """

    max_drop: Annotated[float | None, Parameter(negative="")] = None
    require_speedup: Annotated[float | None, Parameter(negative="")] = None
    require_ratio: Annotated[float | None, Parameter(negative="")] = None

    def check_usage(self, *, metric: str | None) -> None:
        """Refuses limits that cannot be meant.

        Raises:
            UsageError: `max_drop` without a metric, or a limit that is not a positive number.
        """
        if self.max_drop is not None and metric is None:
            raise UsageError(
                "--max-drop needs --metric, and a named metric needs --evaluation with labels; "
                "for example --metric top1 --evaluation test.npz --max-drop 0.5"
            )
        if self.max_drop is not None and not self.max_drop >= 0:
            raise UsageError(f"--max-drop is {self.max_drop}, expected a number >= 0")
        for option, limit in (
            ("--require-speedup", self.require_speedup),
            ("--require-ratio", self.require_ratio),
        ):
            if limit is not None and not limit > 0:
                raise UsageError(f"{option} is {limit}, expected a number > 0, such as 1.2")

    def drops_too_much(self, task: TaskResult) -> bool:
        """Whether the metric fell by more than is allowed."""
        return self.max_drop is not None and not task.drop <= self.max_drop


def check_guards(
    guards: Guards,
    *,
    task: TaskResult | None,
    speedup: float | None,
    ratio: float,
    tried: str = "",
) -> None:
    """Compares a result with its limits.

    Args:
        guards: the limits.
        task: the metric before and after, if it was measured.
        speedup: latency of the original / latency of the result; None if it was not measured.
        ratio: bytes of the original / bytes of the result.
        tried: what was done to keep the metric, for the message.

    Raises:
        GuardError: the limits that are not kept, each with what was measured.
    """
    broken = []
    if task is not None and guards.drops_too_much(task):
        broken.append(
            f"{task.name} went from {task.before:.6g} to {task.after:.6g}, a drop of "
            f"{task.drop:.4g}, but --max-drop allows {guards.max_drop:g}{tried}"
        )
    if guards.require_speedup is not None:
        measured = speedup if speedup is not None else float("nan")
        if not measured >= guards.require_speedup:
            broken.append(
                f"the result runs at {times_text(measured)} of the original's speed, but "
                f"--require-speedup asks for {guards.require_speedup:g}x"
            )
    if guards.require_ratio is not None and not ratio >= guards.require_ratio:
        broken.append(
            f"the file is {times_text(ratio)} smaller, but --require-ratio asks for "
            f"{guards.require_ratio:g}x"
        )
    if broken:
        raise GuardError(f"{'; '.join(broken)}; nothing was written")
