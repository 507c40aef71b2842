"""Prints what limits the fidelity of 8-bit models: activations alone, and weights alone.

    python benchmarks/limits.py [NAME...] [--folder ../shared/models] [--recipe int8-accurate] ...

A model is quantized by a recipe, and the result is taken apart. `weights`: all activations are in
float again, which leaves the error of 8-bit weights. `activations`: all weights of convolutions and
products are what they were before the first pass that quantizes, which leaves the error of 8-bit
activations with ideal weights; `correct-bias` is left out there. Embeddings stay integers in both.
SQNR in dB of the worst float output on held-out feeds (`int8_models.py`), with the runtime's
optimizations off, because it quantizes float weights between integers by itself.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from int8_models import FOLDER, Case, cases

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Constant, Model, Node, Variable, load
from onnxslim_passes.passes.base import Context, Pass, Stage
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]

RECIPES = ("int8", "int8-accurate")


def quantized(passes: list[Pass], floating: Model, context: Context) -> Model:
    """The model after some passes."""
    model = floating.copy()
    for pass_ in passes:
        pass_.apply(model, replace(context, floating=floating))
    return model


def with_float_activations(model: Model) -> Model:
    """A copy in which nothing but weights is rounded."""
    copy = model.copy()
    for node in list(copy.nodes()):
        source = _maker(node.inputs[0]) if node.inputs else None
        if node.op == "DequantizeLinear" and source is not None and source.op == "QuantizeLinear":
            copy.replace_uses(node.outputs[0], source.inputs[0])
        elif node.op == "MatMulInteger":
            assert source is not None  # DynamicQuantizeLinear
            _replace_product(copy, node, source.inputs[0], node.inputs[1].values)
            one = node.graph.add_constant("one", np.array(1, np.float32))
            copy.replace_uses(source.outputs[1], one)
    copy.remove_unused()
    return copy


def with_float_weights(model: Model, weights: Mapping[str, Array]) -> Model:
    """A copy in which the weights of these names have these values, and not codes."""
    copy = model.copy()
    scales = {str(held.name): held.values for held in copy.constants() if held.size < 1 << 20}
    for node in list(copy.nodes()):
        if node.op == "DequantizeLinear" and isinstance(node.inputs[0], Constant):
            values = weights.get(_float_name(node.inputs[0]))
            if values is not None:
                held = node.graph.add_constant("float_weight", values)
                copy.replace_uses(node.outputs[0], held)
        elif node.op == "MatMulInteger":
            name = _float_name(node.inputs[1])
            ideal = _unrounded(weights[name], node.inputs[1].values, scales[f"{name}_scale"])
            _replace_product(copy, node, _steps(node), ideal)
    copy.remove_unused()
    return copy


def _maker(tensor: Variable | Constant) -> Node | None:
    return tensor.inputs[0] if isinstance(tensor, Variable) and tensor.inputs else None


def _float_name(codes: Constant) -> str:
    return str(codes.name).removesuffix("_quantized")


def _unrounded(values: Array, codes: Array, scale: Array) -> Array:
    """The weight (K, N) in steps of its codes (K, N); a Gemm may have it as (N, K)."""
    fitting = [turned / scale for turned in (values, values.T) if turned.shape == codes.shape]
    return min(fitting, key=lambda steps: float(np.abs(steps - codes).max(initial=0.0)))


def _replace_product(model: Model, node: Node, data: Variable, weight: Array) -> None:
    """Makes a MatMulInteger a MatMul of float32; the Cast behind it changes nothing then."""
    held = node.graph.add_constant("float_weight", weight.astype(np.float32))
    model.replace_uses(node.outputs[0], node.graph.add_node("MatMul", [data, held]).outputs[0])


def _steps(node: Node) -> Variable:
    """The data of a MatMulInteger as float32 steps from the zero point."""
    attrs = {"to": onnx.TensorProto.FLOAT}
    numbers = [
        node.graph.add_node("Cast", [node.inputs[index]], attrs=attrs).outputs[0]
        for index in (0, 2)
    ]
    made: Variable = node.graph.add_node("Sub", numbers).outputs[0]
    return made


def measure(case: Case, recipe: str) -> str:
    """One line of the table."""
    calibration, held_out = case.split()
    context = Context(samples=Samples.from_feeds(calibration))
    floating = load(case.path)
    passes = Recipe.open(recipe).passes
    for pass_ in passes:
        if pass_.stage < Stage.QUANTIZE:
            pass_.apply(floating, context)
    rounding = [pass_ for pass_ in passes if pass_.stage == Stage.QUANTIZE]
    plain = [pass_ for pass_ in rounding if pass_.name != "correct-bias"]
    whole = quantized(rounding, floating, context)
    uncorrected = quantized(plain, floating, context) if plain != rounding else whole
    weights = {str(weight.name): weight.constant.values for weight in floating.weights()}
    models = (whole, with_float_weights(uncorrected, weights), with_float_activations(whole))
    figures = []
    with open_session(case.path) as reference:
        for model in models:
            with open_session(model, optimize="none") as candidate:
                figures.append(compare_outputs(reference, candidate, held_out).sqnr_db)
    numbers = " ".join(f"{figure:11.2f}" for figure in figures)
    return f"{case.name:20} {recipe:13} {numbers}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    options = parser.parse_args()
    print(f"{'model':20} {'recipe':13} {'both':>11} {'activations':>11} {'weights':>11}")
    for case in cases(options.folder):
        if options.names and case.name not in options.names:
            continue
        for recipe in options.recipe or RECIPES:
            try:
                print(measure(case, recipe), flush=True)
            except OnnxSlimError as error:
                print(f"{case.name:20} {recipe:13} {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
