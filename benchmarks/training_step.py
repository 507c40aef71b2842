"""One training step beside PyTorch's: CPU time and peak memory, one thread.

    pip install -r benchmarks/requirements-training.txt
    python benchmarks/training_step.py [NET...] [--rounds N]

A step is forward, cross-entropy, backward and SGD with momentum 0.9. The networks are exported from
PyTorch by this script. Both engines run in turns in one process; times are CPU seconds of the
process, and the median and the minimum over the rounds are printed. Peak memory is the largest
resident set of a process of its own for each engine, and how much of it came after its imports.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

RATE, MOMENTUM = 1e-3, 0.9
GOAL_TIME, GOAL_MEMORY = 1.0, 1.5
STEPS_FOR_MEMORY = 5

Step = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """One network on one batch.

    Attributes:
        name: as it is printed.
        net: key of `torch_nets.NETS`.
        batch_norm: statistics of the batch, or frozen.
    """

    name: str
    net: str
    batch_norm: str = "frozen"


SETTINGS = (
    Setting("LeNet-5, 64 of 28x28", "lenet5"),
    Setting("ResNet-18, 16 of 32x32, frozen statistics", "resnet18"),
    Setting("ResNet-18, 16 of 32x32, batch statistics", "resnet18", "batch"),
    Setting("MobileNet, 16 of 32x32, frozen statistics", "mobilenet"),
    Setting("MobileNet, 16 of 32x32, batch statistics", "mobilenet", "batch"),
    Setting("the same without depthwise convolutions, frozen", "pointwise"),
    Setting("the same without depthwise convolutions, batch", "pointwise", "batch"),
    Setting("Transformer encoder, 16 of 32 tokens", "encoder"),
)


def torch_step(setting: Setting) -> Step:
    """PyTorch's step."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from benchmarks import torch_nets

    torch.set_num_threads(1)
    net, x, labels = torch_nets.make(setting.net)
    net.train(setting.batch_norm == "batch")
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=MOMENTUM)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def onnx_file(setting: Setting) -> bytes:
    """The network as PyTorch exports it, batch free."""
    import torch

    from benchmarks import torch_nets

    net, x, _ = torch_nets.make(setting.net)
    net.train(setting.batch_norm == "batch")
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        torch.onnx.export(
            net,
            (x,),
            target,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["scores"],
            dynamic_axes={"x": {0: "N"}, "scores": {0: "N"}},
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    return target.getvalue()


def our_step(setting: Setting, model: bytes, x: np.ndarray, labels: np.ndarray) -> Step:
    """The step of the exported training graph."""
    import onnx

    from onnxslim_passes.model import Model
    from onnxslim_passes.training.data import Batch
    from onnxslim_passes.training.options import Objective, Parameters, Update
    from onnxslim_passes.training.program import build
    from onnxslim_passes.training.trainer import Trainer

    program = build(
        Model.from_proto(onnx.load_from_string(model)),
        objective=Objective(loss="cross-entropy"),
        update=Update(optimizer="sgd", momentum=MOMENTUM),
        parameters=Parameters(batch_norm=setting.batch_norm),
    )
    trainer = Trainer(program)
    batch = Batch({"x": x}, labels, len(labels))
    return lambda: trainer.step(batch, RATE).loss


def time_in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step, the engines in turns."""
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            times[name].append(time.process_time() - begin)
    return times


def peak_bytes() -> int:
    """The largest resident set of this process so far, without what its parent once had (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024


def measure_memory(engine: str, number: int, folder: Path) -> tuple[float, float]:
    """Peak MB of a process of its own, and how much came after its imports."""
    command = [sys.executable, __file__, "--worker", engine, str(number), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    whole, start = map(int, found.stdout.split()[-2:])
    return whole / 1e6, (whole - start) / 1e6


def work(engine: str, number: int, folder: Path) -> None:
    """What the process of `measure_memory` does."""
    setting = SETTINGS[number]
    if engine == "torch":
        import torch  # noqa: F401

        start = peak_bytes()
        step = torch_step(setting)
    else:
        import onnxslim_passes.training.trainer  # noqa: F401

        start = peak_bytes()
        arrays = np.load(folder / f"{number}.npz")
        model = (folder / f"{number}.onnx").read_bytes()
        step = our_step(setting, model, arrays["x"], arrays["labels"])
    for _ in range(STEPS_FOR_MEMORY):
        step()
    print(peak_bytes(), start)


def compare(number: int, rounds: int, folder: Path) -> None:
    """Prints the lines of one setting."""
    from benchmarks import torch_nets

    setting = SETTINGS[number]
    _, x, labels = torch_nets.make(setting.net)
    model = onnx_file(setting)
    (folder / f"{number}.onnx").write_bytes(model)
    np.savez(folder / f"{number}.npz", x=x.numpy(), labels=labels.numpy())
    steps = {
        "torch": torch_step(setting),
        "ours": our_step(setting, model, x.numpy(), labels.numpy()),
    }
    first = {name: step() for name, step in steps.items()}
    times = time_in_turns(steps, rounds)
    medians = {name: float(np.median(values)) * 1e3 for name, values in times.items()}
    minima = {name: min(values) * 1e3 for name, values in times.items()}
    memory = {name: measure_memory(name, number, folder) for name in steps}
    ratio = minima["ours"] / minima["torch"]
    share = memory["ours"][0] / memory["torch"][0]
    print(
        f"| {setting.name} | {medians['torch']:.1f} ({minima['torch']:.1f}) "
        f"| {medians['ours']:.1f} ({minima['ours']:.1f}) | {ratio:.2f} "
        f"| {memory['torch'][0]:.0f} ({memory['torch'][1]:.0f}) "
        f"| {memory['ours'][0]:.0f} ({memory['ours'][1]:.0f}) | {share:.2f} "
        f"| {abs(first['ours'] - first['torch']):.1e} "
        f"| {'yes' if ratio <= GOAL_TIME and share <= GOAL_MEMORY else 'no'} |",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", help="lenet5, resnet18, mobilenet, pointwise, encoder")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(
        "| network | PyTorch ms: median (min) | ours | ratio of minima "
        "| PyTorch MB (after imports) | ours | ratio | difference of losses | goals met |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for number, setting in enumerate(SETTINGS):
            if not arguments.nets or setting.net in arguments.nets:
                compare(number, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
