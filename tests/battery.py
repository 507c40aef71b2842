"""The battery of checks that every pass has to satisfy; `check_pass(MyPass)` runs all of them.

`check_options` looks at the class alone; `check_on_model` tries it on one network; `check_idle` on
a network in which there is nothing to do. `tests/passes/test_battery.py` runs them on every pass
in the list, one test each.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pydantic
import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import RecipeError, UnknownNameError, UnsupportedModelError
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage
from onnxslim_passes.passes.selection import Selection
from onnxslim_passes.recipe import build_pass, format_pass, options_of, parse_pass
from onnxslim_passes.runtime import open_session
from onnxslim_passes.verification import LOSSLESS_DB
from tests.zoo_small import IDLE, SMALL, Small

Options = Mapping[str, Any]

_NAME = re.compile(r"[a-z]+(-[a-z0-9]+)+")


def check_pass(
    pass_class: type[Pass],
    *,
    samples: Samples | None = None,
    models: Iterable[Small] | None = None,
    variants: Sequence[Options] = (),
) -> None:
    """Runs the whole battery.

    Args:
        pass_class: the pass; it need not be in the list of passes.
        samples: calibration data instead of each network's own feeds.
        models: networks to try it on instead of `tests.zoo_small`.
        variants: further sets of options to try beside the defaults.
    """
    check_class(pass_class)
    for options in ({}, *variants):
        pass_ = pass_class(**options)
        for small in [build() for build in SMALL.values()] if models is None else models:
            check_on_model(pass_, small, samples=samples)
        for build in IDLE.values():
            check_idle(pass_, build())


# ---------------- the class


def check_class(pass_class: type[Pass]) -> None:
    """Name, stage, documentation; options that are checked, frozen and documented."""
    pass_ = pass_class()
    assert _NAME.fullmatch(pass_.name), f"{pass_.name!r} is not verb-object in lower case"
    assert isinstance(pass_.stage, Stage)
    assert len(pass_.summary.splitlines()) == 1, "summary: one line for listings"
    assert (pass_class.__doc__ or "").strip(), "a docstring says what the pass does"
    assert all(reference.strip() for reference in pass_.references)
    assert dataclasses.is_dataclass(pass_class), "decorate the class with @pass_options"
    for option in options_of(pass_class):
        assert option.description, f"{pass_.name}: option {option.name!r} has no description"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(pass_, option.name, option.default)
    with pytest.raises(pydantic.ValidationError, match="no_such_option"):
        pass_class(no_such_option=1)
    assert "<" not in repr(pass_), "options are plain values"


def check_recipe(pass_: Pass) -> None:
    """A pass of the list becomes text and a table, and comes back equal."""
    assert parse_pass(format_pass(pass_)) == pass_
    table = pass_.to_table()
    name = table.pop("name")
    assert build_pass(name, table) == pass_
    assert all(item is not None for item in table.values()), "TOML has no null"
    with pytest.raises((UnknownNameError, RecipeError), match="no_such_option"):
        parse_pass(f"{pass_.name}:no_such_option=1")


# ---------------- on a network


def check_on_model(pass_: Pass, small: Small, *, samples: Samples | None = None) -> None:
    """Truthful, repeatable, complete in its account, and what comes out runs.

    A pass may refuse a network with UnsupportedModelError if it leaves it as it was.
    """
    original = Model.from_proto(small.proto)
    source = to_bytes(original)
    samples = samples or Samples.from_feeds(list(small.feeds))
    context = Context(samples=samples, seed=3, reference=original)
    check_preview(pass_, original)
    work = original.copy()
    try:
        pass_.requires(work)
        result = pass_.apply(work, context)
    except UnsupportedModelError:
        assert to_bytes(work) == source, "a refused model must stay as it was"
        return
    assert to_bytes(original) == source, "the model that was copied must stay as it was"
    check_truthful(result, source, work)
    check_decisions(result)
    if isinstance(pass_, Selection):
        check_complete(pass_, original, result)
    check_kept(original, work)
    check_runs(original, work, small.feeds, lossless=pass_.lossless)
    check_repeatable(pass_, original, work, context)
    check_idempotent(pass_, work, context)


def check_idle(pass_: Pass, small: Small) -> None:
    """Nothing to do: nothing is changed, and that is said."""
    model = Model.from_proto(small.proto)
    source = to_bytes(model)
    context = Context(samples=Samples.from_feeds(list(small.feeds)), reference=model.copy())
    pass_.requires(model)
    result = pass_.apply(model, context)
    assert not result.changed
    assert not any(decision.taken for decision in result.decisions)
    assert to_bytes(model) == source


def check_preview(pass_: Pass, model: Model) -> None:
    """Asking what would be done does nothing."""
    source = to_bytes(model)
    foreseen = pass_.preview(model)
    assert foreseen is None or all(isinstance(item, Decision) for item in foreseen)
    assert to_bytes(model) == source


def check_truthful(result: PassResult, source: bytes, work: Model) -> None:
    """`changed` is what the bytes say, and so are the decisions."""
    assert result.changed == (to_bytes(work) != source), f"changed={result.changed} is not true"
    taken = [decision for decision in result.decisions if decision.taken]
    assert result.changed == bool(taken), "a change and a taken decision go together"


def check_decisions(result: PassResult) -> None:
    """Each says where and why, once, in plain data."""
    for decision in result.decisions:
        assert decision.where.strip()
        assert decision.reason.strip(), f"{decision.where}: no reason"
        for key, figure in decision.figures.items():
            assert type(figure) in (int, float, str), f"{decision.where}: {key} is {type(figure)}"


def check_complete(pass_: Selection, original: Model, result: PassResult) -> None:
    """Every weight of a layer is accounted for: by its own name or by a node that takes it."""
    told = {decision.where for decision in result.decisions}
    for weight in original.weights():
        if weight.role not in ("weight", "recurrent") or weight.size < pass_.min_elements:
            continue
        labels = {weight.where, *(node.where for node in weight.nodes)}
        assert labels & told, f"nothing is said about {weight.where!r} (or {labels})"


def check_kept(original: Model, work: Model) -> None:
    """What callers rely on: inputs, outputs, metadata, versions that never go back."""
    before, after = original.to_proto(), work.to_proto()
    assert [info.name for info in after.graph.input][: len(original.graph.inputs)] == [
        tensor.name for tensor in original.graph.inputs
    ]
    assert list(after.graph.output) == list(before.graph.output)
    assert {i.name: i for i in after.graph.input} == {i.name: i for i in before.graph.input}
    assert work.metadata == original.metadata
    assert (after.producer_name, after.doc_string) == (before.producer_name, before.doc_string)
    assert work.opset >= original.opset
    assert work.ir_version >= original.ir_version


def check_runs(
    original: Model, work: Model, feeds: Sequence[Mapping[str, Any]], *, lossless: bool
) -> None:
    """The checker and ONNX Runtime accept it; outputs are finite, of the same kind, and equal."""
    check_model(work)
    with open_session(original) as reference, open_session(work) as candidate:
        for feed in feeds:
            expected, given = reference.run(feed), candidate.run(feed)
            for name, array in expected.items():
                assert given[name].dtype == array.dtype
                assert given[name].shape == array.shape
                if array.dtype.kind == "f":
                    assert np.isfinite(given[name]).all(), f"{name} is not finite"
        if lossless:
            fidelity = compare_outputs(reference, candidate, feeds)
            assert fidelity.sqnr_db >= LOSSLESS_DB, f"{fidelity.sqnr_db:.1f} dB"
            assert not math.isnan(fidelity.max_error)


def check_repeatable(pass_: Pass, original: Model, work: Model, context: Context) -> None:
    """The same seed gives the same bytes, from a model read anew, too."""
    for model in (original.copy(), Model.from_proto(original.to_proto())):
        pass_.apply(model, context)
        assert to_bytes(model) == to_bytes(work), "not deterministic"


def check_idempotent(pass_: Pass, work: Model, context: Context) -> None:
    """A second run finds nothing left to do, also if the result was saved in between."""
    done = to_bytes(work)
    reread = Model.from_proto(onnx.load_from_string(done))
    for model in (work, reread):
        again = pass_.apply(model, context)
        taken = [decision for decision in again.decisions if decision.taken]
        assert not again.changed, f"a second run changed the model: {taken[:3]}"
        assert to_bytes(model) == done


def to_bytes(model: Model) -> bytes:
    """The message, comparable byte by byte."""
    message: bytes = model.to_proto().SerializeToString(deterministic=True)
    return message
