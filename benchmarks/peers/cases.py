"""The models with their samples: some to calibrate with, others to compare outputs on."""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.runtime import Session, open_session
from peers.feeds import Feed

CALIBRATION_SAMPLES = 64
HELD_OUT_SAMPLES = 48
Score = Callable[[Session], float]


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        name: what the table calls it.
        path: the file as downloaded.
        calibration: makes the samples that tools may see, batch 1, at most 64.
        held_out: makes samples that none of them sees, batch 1.
        score: higher is better, in percent; of the score's own data.
        score_name: what it is.
        transformer: whether NNCF is told so, and dynamic and weight-only quantizers are run.
        dynamic: whether dynamic quantizers are run.
    """

    name: str
    path: Path
    calibration: Callable[[], Iterable[Feed]]
    held_out: Callable[[], Iterable[Feed]]
    score: Score
    score_name: str
    transformer: bool = False
    dynamic: bool = False


def load_tasks(folder: Path) -> ModuleType:
    """The folder's tasks.py: a dictionary TASKS of model file, calibration feeds and metric."""
    spec = importlib.util.spec_from_file_location("tasks", folder / "tasks.py")
    if spec is None or spec.loader is None or not (folder / "tasks.py").is_file():
        raise SystemExit(f"{folder} has no tasks.py; name the folder of the models with --folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)
    return module


def spread(items: Iterable[Feed], count: int) -> list[Feed]:
    """At most `count` of the items, evenly spaced, the first among them."""
    every = list(items)
    if len(every) <= count:
        return every
    return [every[index * len(every) // count] for index in range(count)]


def single(feeds: Iterable[Feed], axes: dict[str, int]) -> Iterator[Feed]:
    """Samples of batch 1; `axes` has the batch axis of each input that has one."""
    for feed in feeds:
        batch = next(feed[name].shape[axis] for name, axis in axes.items())
        for index in range(batch):
            yield {
                name: array.take([index], axes[name]) if name in axes else array
                for name, array in feed.items()
            }


def all_cases(folder: Path) -> dict[str, Case]:
    """Every case by name."""
    tasks = load_tasks(folder)
    cases = [
        _text_lines(folder, tasks),
        _pages(folder),
        _sentences(folder, tasks),
        _photographs(folder, tasks),
        _speech(folder, tasks),
    ]
    return {case.name: case for case in cases}


def _of_task(folder: Path, tasks: ModuleType, name: str, axes: dict[str, int], **rest: Any) -> Case:
    """A case whose calibration samples and score are those of tasks.py."""
    task = tasks.TASKS[name]
    return Case(
        name,
        folder / task.model,
        lambda: spread(single(task.calibration(), axes), CALIBRATION_SAMPLES),
        score=lambda session: float(task.metric(session.raw)),
        **rest,
    )


def _text_lines(folder: Path, tasks: ModuleType) -> Case:
    def held_out() -> list[Feed]:
        lines = ({"x": x} for x, _ in tasks.text_lines("ocr_lines.npz"))
        return spread(lines, HELD_OUT_SAMPLES)

    return _of_task(
        folder,
        tasks,
        "ppocr_v4_rec",
        {"x": 0},
        held_out=held_out,
        score_name="characters right, %",
    )


def _sentences(folder: Path, tasks: ModuleType) -> Case:
    axes = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0}

    def held_out() -> list[Feed]:
        ids = tasks.load("stsb_test.npz")["a"]
        return spread((tasks.sentence_feed(row[None]) for row in ids), HELD_OUT_SAMPLES)

    return _of_task(
        folder,
        tasks,
        "minilm_l6",
        axes,
        held_out=held_out,
        score_name="Spearman x 100",
        transformer=True,
        dynamic=True,
    )


def _photographs(folder: Path, tasks: ModuleType) -> Case:
    def held_out() -> list[Feed]:
        images = itertools.islice(tasks.photographs("imagenet_test400.npz", 224), HELD_OUT_SAMPLES)
        return [{"image": tasks.signed_chw(image)[None]} for image in images]

    return _of_task(
        folder,
        tasks,
        "efficientnet_lite0",
        {"image": 0},
        held_out=held_out,
        score_name="top-1, %",
    )


def _speech(folder: Path, tasks: ModuleType) -> Case:
    axes = {"input": 0, "state": 1}

    def held_out() -> list[Feed]:
        session = tasks.open_session(folder / tasks.TASKS["silero_vad_16k_op15"].model)
        steps = (feed for feed, _ in tasks.run_vad(session, "vad_test.npz"))
        return spread(single(steps, axes), HELD_OUT_SAMPLES)

    return _of_task(
        folder,
        tasks,
        "silero_vad_16k_op15",
        axes,
        held_out=held_out,
        score_name="ROC-AUC x 100",
        dynamic=True,
    )


_PAGES_SEEN = 4  # of six; the others are held out
_CROPS = 15  # of each page
_TEXT = 0.3  # the detector's map is text above this


def _pages(folder: Path) -> Case:
    path = folder / "robust" / "ppocr_v4_det.onnx"
    held_out = page_samples(folder, slice(_PAGES_SEEN, None), side=320)
    return Case(
        "ppocr_v4_det",
        path,
        lambda: page_samples(folder, slice(0, _PAGES_SEEN), side=256),
        lambda: held_out,
        score=lambda session: mask_overlap(path, session, held_out),
        score_name="overlap of text with float's, %",
    )


def page_samples(folder: Path, pages: slice, *, side: int) -> list[Feed]:
    """Whole pages of 480 x 480, each followed by 15 crops of `side` x `side` (a multiple of 32)."""
    with np.load(folder / "data" / "det_pages.npz") as data:
        pixels = data[data.files[0]].astype(np.float32) / 255
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
    deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
    rng = np.random.default_rng(0)
    feeds = []
    for page in ((pixels - mean) / deviation)[pages]:
        corners = rng.integers(0, page.shape[1] - side + 1, (_CROPS, 2))
        crops = [page[:, top : top + side, left : left + side] for top, left in corners]
        feeds += [{"x": np.ascontiguousarray(part[None])} for part in (page, *crops)]
    return feeds


def mask_overlap(reference: Path, session: Session, feeds: list[Feed]) -> float:
    """Intersection over union, in percent, of the text that both models find in all feeds."""
    both = either = 0
    with open_session(reference) as original:
        for feed in feeds:
            ours, theirs = (_mask(one, feed) for one in (original, session))
            both += int((ours & theirs).sum())
            either += int((ours | theirs).sum())
    return 100 * both / max(1, either)


def _mask(session: Session, feed: Feed) -> npt.NDArray[np.bool_]:
    return np.asarray(next(iter(session.run(feed).values())) > _TEXT)
