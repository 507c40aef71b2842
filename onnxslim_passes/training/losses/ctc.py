"""Connectionist temporal classification, with two Scans and no gradient through them.

Graves, Fernandez, Gomez and Schmidhuber 2006, "Connectionist Temporal Classification". A label of U
classes becomes a sequence of S = 2 U + 1 with blanks around each (section 4.1). alpha_t(s) is the
probability of all paths that are at its place s at time t, beta_t(s) that of all ways to go on from
there; their recursions run over time, forwards and backwards, in logarithms. gamma_t(k), the sum of
alpha_t(s) beta_t(s) / p over the places s of class k, is the probability of class k at time t given
the label, and -gamma_t(k) is the derivative of -ln p by ln y_t(k) (their equation 15). So gamma is
taken as constant and -sum gamma ln y is differentiated: it has the same gradient, and no rule for
Scan is needed.
"""

import numpy as np
import onnx.parser

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.losses.base import LabelSpec, Loss, Measure, mean
from onnxslim_passes.training.losses.embedding import embed
from onnxslim_passes.training.losses.label_losses import log_probabilities
from onnxslim_passes.training.losses.scores import Scores, class_axis
from onnxslim_passes.training.options import Objective

__all__ = ["ctc"]

# The blank is class 0 and padding of labels is -1. -1e30 stands for the logarithm of zero: its exp
# is 0, and differences of two of it are numbers. A label that does not fit into the time has no
# path; it counts as 0 and has no gradient. `gamma` comes out divided by the label's length.
_ALIGNMENT = """
<ir_version: 9, opset_import: ["" : {opset}]>
ctc (float[N, T, C] logp, int64[N, U] labels) => (float[N] loss, float[N, T, C] gamma)
<int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis1 = {{1}}, int64[1] axis2 = {{2}},
 int64 none = {{-1}}, int64[2] flat = {{0, -1}},
 int64[4] by2 = {{0, 2, 0, -2}}, int64[4] one_more = {{0, 0, 0, 1}},
 float impossible = {{-1e30}}, float certain = {{0.0}}, float least = {{-1e29}}>
{{
    padded = Less (labels, zero)
    known = Where (padded, zero, labels)
    is_label = Not (padded)
    counted = Cast <to = 7> (is_label)
    length = ReduceSum <keepdims = 1> (counted, axis1)
    blanks = Mul (known, zero)
    column_blank = Unsqueeze (blanks, axis2)
    column_label = Unsqueeze (known, axis2)
    pairs = Concat <axis = 2> (column_blank, column_label)
    paired = Reshape (pairs, flat)
    path = Pad (paired, one_more, zero)
    two_before = Pad (path, by2, none)
    is_blank = Equal (path, zero)
    repeats = Equal (path, two_before)
    no_skip = Or (is_blank, repeats)
    skip = Where (no_skip, impossible, certain)
    path_row = Unsqueeze (path, axis1)
    time = Shape <start = 1, end = 2> (logp)
    places = Shape <start = 1, end = 2> (path)
    samples = Shape <start = 0, end = 1> (logp)
    wide = Concat <axis = 0> (samples, time, places)
    index = Expand (path_row, wide)
    emitted = GatherElements <axis = 2> (logp, index)
    steps = Transpose <perm = [1, 0, 2]> (emitted)
    count = Squeeze (places)
    place = Range (zero, count, one)
    at_start = Equal (place, zero)
    start_row = Where (at_start, certain, impossible)
    row_shape = Shape (path)
    start = Expand (start_row, row_shape)
    two = Add (one, one)
    last = Mul (length, two)
    at_end = Equal (place, last)
    end = Where (at_end, certain, impossible)
    alpha_end, alpha = Scan <num_scan_inputs = 1, body = forward (before, step) => (after, seen) {{
        f_one = Constant <value_ints = [0, 1, 0, -1]> ()
        f_two = Constant <value_ints = [0, 2, 0, -2]> ()
        next = Pad (before, f_one, impossible)
        jump = Pad (before, f_two, impossible)
        jumped = Add (jump, skip)
        most = Max (before, next, jumped)
        d0 = Sub (before, most)
        d1 = Sub (next, most)
        d2 = Sub (jumped, most)
        e0 = Exp (d0)
        e1 = Exp (d1)
        e2 = Exp (d2)
        e = Sum (e0, e1, e2)
        l = Log (e)
        reached = Add (most, l)
        after = Add (reached, step)
        seen = Identity (after)
    }}> (start, steps)
    skipped_end, beta = Scan <num_scan_inputs = 1, scan_input_directions = [1],
                              scan_output_directions = [1],
                              body = backward (b_before, b_step) => (b_after, b_seen) {{
        b_one = Constant <value_ints = [0, -1, 0, 1]> ()
        b_two = Constant <value_ints = [0, -2, 0, 2]> ()
        b_next = Pad (b_before, b_one, impossible)
        b_skipping = Add (b_before, skip)
        b_jumped = Pad (b_skipping, b_two, impossible)
        b_most = Max (b_before, b_next, b_jumped)
        b_d0 = Sub (b_before, b_most)
        b_d1 = Sub (b_next, b_most)
        b_d2 = Sub (b_jumped, b_most)
        b_e0 = Exp (b_d0)
        b_e1 = Exp (b_d1)
        b_e2 = Exp (b_d2)
        b_e = Sum (b_e0, b_e1, b_e2)
        b_l = Log (b_e)
        b_seen = Add (b_most, b_l)
        b_after = Add (b_seen, b_step)
    }}> (end, steps)
    both = Add (alpha, beta)
    top = ReduceMax <keepdims = 1> (both, axis2)
    centred = Sub (both, top)
    shares = Exp (centred)
    share_sum = ReduceSum <keepdims = 1> (shares, axis2)
    log_sum = Log (share_sum)
    logp_label = Add (top, log_sum)
    possible = Greater (logp_label, least)
    posterior = Div (shares, share_sum)
    occupied = Where (possible, posterior, certain)
    by_sample = Transpose <perm = [1, 0, 2]> (occupied)
    nothing = Mul (logp, certain)
    occupancy = ScatterElements <axis = 2, reduction = "add"> (nothing, index, by_sample)
    first = Gather <axis = 0> (logp_label, zero)
    fits = Gather <axis = 0> (possible, zero)
    nll_column = Neg (first)
    kept = Where (fits, nll_column, certain)
    at_least_one = Max (length, one)
    divisor = Cast <to = 1> (at_least_one)
    normed = Div (kept, divisor)
    loss = Squeeze (normed, axis1)
    divisors = Unsqueeze (divisor, axis1)
    gamma = Div (occupancy, divisors)
}}
"""


def ctc(emit: Emitter, scores: Scores, labels: str, options: Objective) -> Loss:
    """``-ln p(label | x)`` over the label's length, averaged over the samples.

    Labels are int64, shape (samples, longest label), classes from 1, padded with -1 behind; class 0
    is the blank. The output has the classes on its last axis: (samples, time, classes).

    Raises:
        UnsupportedModelError: the output has other axes.
    """
    x = scores.tensor
    if emit.rank(x) != 3 or class_axis(emit, scores, options.class_axis) != 2:
        raise UnsupportedModelError(
            f"ctc: {x.name!r} has shape {emit.shape(x)}; expected (samples, time, classes)."
        )
    samples, _, classes = emit.shape(x)
    shape = (samples, "label_length")
    given = emit.input(labels, np.int64, shape)
    logp = log_probabilities(emit, emit.cast(x, np.float32), 2)
    text = _ALIGNMENT.format(opset=emit.model.opset)
    core = Model.from_proto(onnx.parser.parse_model(text))
    found = embed(emit, core, prefix="ctc/", inputs={"logp": emit.stop(logp), "labels": given})
    value = mean(emit, found["loss"])
    weighted = emit.mul(emit.stop(found["gamma"]), logp)
    slope = mean(emit, emit.neg(emit.reduce_sum(weighted, [1, 2])))
    known = int(classes) if isinstance(classes, int) else None
    spec = LabelSpec(labels, "int64", shape, known, "class numbers, padded with -1", lowest=-1)
    return Loss(value, slope, Measure("ctc", value, False), spec, scores.decisions)
