"""Gradients of LSTM, GRU and RNN through time.

With h' and c' the states before a step, z the inputs of the gates and W, R, b their weights
(letters of the ONNX standard), every rule finds dz for all steps in one Scan backwards, and then

    dX = dz W,  dW = sum dz^T x,  dR = sum dz^T h',  db = sum dz.

Behind the end of a shorter sequence the states stay, and dz is 0.
"""

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.recurrence import (
    Direction,
    collect,
    directions_of,
    scan,
    slope,
    weight_product,
    without_last,
)
from onnxslim_passes.training.gradients.step import Rule, Step

Parts = dict[int, Tensor]


def rnn(step: Step) -> list[Tensor | None]:
    """H = f(z), z = W x + R h' + b."""
    directions = directions_of(step, 1)
    return collect(step, directions, [_rnn_direction(one) for one in directions])


def gru(step: Step) -> list[Tensor | None]:
    """H = (1 - z) n + z h', with the update gate z, the reset gate r in the candidate n."""
    directions = directions_of(step, 3)
    return collect(step, directions, [_gru_direction(one) for one in directions])


def lstm(step: Step) -> list[Tensor | None]:
    """C = f c' + i g, h = o tanh(c), with peepholes from c' to i and f and from c to o."""
    directions = directions_of(step, 4)
    return collect(step, directions, [_lstm_direction(one) for one in directions])


def _activations(one: Direction, defaults: list[str]) -> list[str]:
    count = len(defaults)
    given = one.step.attr("activations", [])
    return given[one.index * count : (one.index + 1) * count] if given else defaults


def _sequences(one: Direction, **named: Tensor) -> dict[str, Tensor]:
    """What the body takes at each step; gradients of outputs and the mask are always among it."""
    emit = one.emit
    dy = one.dy if one.mask is None else emit.mul(one.dy, one.mask)
    return {"dy": dy, **({} if one.mask is None else {"mask": one.mask}), **named}


def _weight_parts(one: Direction, dz: Tensor) -> Parts:
    """dX, dW, dR and db of gates that are linear in x and h'."""
    emit = one.emit
    total = emit.reduce_sum(dz, [0, 1])
    return {
        0: emit.op("MatMul", dz, one.w),
        1: weight_product(emit, dz, one.x),
        2: weight_product(emit, dz, one.before),
        3: emit.op("Concat", total, total, axis=0),
    }


def _summed_bias(one: Direction, count: int) -> Tensor | None:
    """Input and recurrent bias together."""
    if one.bias is None:
        return None
    emit = one.emit
    sizes = emit.ints(count * one.hidden, count * one.hidden)
    return emit.add(*emit.ops("Split", one.bias, sizes, count=2, axis=0))


def _stay(one: Direction, state: str) -> str:
    """The end of a body: the state before a step, which stays where the sequence has ended."""
    if one.mask is None:
        return f"next_{state} = Identity(step_{state})"
    return f"""
        in_{state} = Mul(step_{state}, mask)
        out_{state} = Mul({state}, mask)
        rest_{state} = Sub({state}, out_{state})
        next_{state} = Add(in_{state}, rest_{state})
    """


def _cut(one: Direction) -> str:
    """The gates' gradients of a step, 0 where the sequence has ended."""
    return "dz = Identity(dz_step)" if one.mask is None else "dz = Mul(dz_step, mask)"


def _rnn_direction(one: Direction) -> Parts:
    emit = one.emit
    (activation,) = _activations(one, ["Tanh"])
    states, (dz,) = scan(
        one,
        states={"dh": one.state(_at(one.step, 1))},
        sequences=_sequences(one, slope=slope(emit, activation, one.after)),
        captured={"r": one.r},
        body=f"""
            dht = Add(dh, dy)
            dz_step = Mul(dht, slope)
            {_cut(one)}
            step_dh = MatMul(dz_step, r)
            {_stay(one, "dh")}
        """,
        results={"dz": one.hidden},
        backward=True,
    )
    return {**_weight_parts(one, dz), 5: states[0]}


def _at(step: Step, index: int) -> Tensor | None:
    return step.dys[index] if index < len(step.dys) else None


def _gru_direction(one: Direction) -> Parts:
    emit, hidden = one.emit, one.hidden
    gate, candidate = _activations(one, ["Sigmoid", "Tanh"])
    inside = bool(one.step.attr("linear_before_reset", 0))
    wz_wr, wn = emit.ops("Split", one.w, emit.ints(2 * hidden, hidden), count=2, axis=0)
    rz_rr, rn = emit.ops("Split", one.r, emit.ints(2 * hidden, hidden), count=2, axis=0)
    gates_bias, input_bias, hidden_bias = _gru_bias(one)
    gates = emit.op(gate, one.preactivation(one.x, one.before, wz_wr, rz_rr, gates_bias))
    z, r = one.split(gates, 2)
    # q: what the reset gate multiplies; before the product with the weights, or behind it.
    q = emit.op("MatMul", one.before, emit.transpose(rn, [1, 0])) if inside else one.before
    if inside and hidden_bias is not None:
        q = emit.add(q, hidden_bias)
    reset = emit.mul(r, q)
    total = emit.op("MatMul", one.x, emit.transpose(wn, [1, 0]))
    total = emit.add(
        total, reset if inside else emit.op("MatMul", reset, emit.transpose(rn, [1, 0]))
    )
    for bias in (input_bias, None if inside else hidden_bias):
        total = total if bias is None else emit.add(total, bias)
    n = emit.op(candidate, total)
    states, (dz,) = scan(
        one,
        states={"dh": one.state(_at(one.step, 1))},
        sequences=_sequences(
            one,
            z=z,
            r=r,
            to_z=emit.mul(emit.sub(one.before, n), slope(emit, gate, z)),
            to_n=emit.mul(emit.one_minus(z), slope(emit, candidate, n)),
            to_r=emit.mul(q, slope(emit, gate, r)),
        ),
        captured={"rzr": rz_rr, "rn": rn},
        body=_gru_body(one, inside=inside),
        results={"dz": 3 * hidden},
        backward=True,
    )
    dzr, dn = emit.ops("Split", dz, emit.ints(2 * hidden, hidden), count=2, axis=2)
    dq = emit.mul(dn, r) if inside else dn
    through = one.before if inside else reset
    before = emit.op(
        "Concat", weight_product(emit, dzr, one.before), weight_product(emit, dq, through), axis=0
    )
    parts = [emit.reduce_sum(part, [0, 1]) for part in (dz, dzr, dq)]
    return {
        0: emit.op("MatMul", dz, one.w),
        1: weight_product(emit, dz, one.x),
        2: before,
        3: emit.op("Concat", *parts, axis=0),
        5: states[0],
    }


def _gru_bias(one: Direction) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The bias of both gates, and of the candidate from the input and from the state."""
    if one.bias is None:
        return None, None, None
    emit, hidden = one.emit, one.hidden
    sizes = emit.ints(2 * hidden, hidden, 2 * hidden, hidden)
    gates, candidate, gates_too, state = emit.ops("Split", one.bias, sizes, count=4, axis=0)
    return emit.add(gates, gates_too), candidate, state


def _gru_body(one: Direction, *, inside: bool) -> str:
    if inside:
        back = """
            dr = Mul(dn, to_r)
            dq = Mul(dn, r)
            ds = MatMul(dq, rn)
        """
    else:
        back = """
            dq = MatMul(dn, rn)
            dr = Mul(dq, to_r)
            ds = Mul(dq, r)
        """
    return f"""
        dht = Add(dh, dy)
        du = Mul(dht, to_z)
        dn = Mul(dht, to_n)
        {back}
        dgates = Concat<axis = 1>(du, dr)
        dz_step = Concat<axis = 1>(dgates, dn)
        {_cut(one)}
        kept = Mul(dht, z)
        linear = MatMul(dgates, rzr)
        some = Add(kept, ds)
        step_dh = Add(some, linear)
        {_stay(one, "dh")}
    """


def _lstm_direction(one: Direction) -> Parts:
    emit, hidden = one.emit, one.hidden
    gate, cell, out = _activations(one, ["Sigmoid", "Tanh", "Tanh"])
    z = one.preactivation(one.x, one.before, one.w, one.r, _summed_bias(one, 4))
    zi, zo, zf, zg = one.split(z, 4)
    peepholes = _peepholes(one)
    g = emit.op(cell, zg)
    c, before = _cells(one, zi, zf, g, gate, peepholes)
    if peepholes is not None:
        seen = zip((zi, zo, zf), peepholes, (before, c, before), strict=True)
        zi, zo, zf = (emit.add(part, emit.mul(weight, state)) for part, weight, state in seen)
    i, o, f = (emit.op(gate, part) for part in (zi, zo, zf))
    squashed = emit.op(out, c)
    states, (dz,) = scan(
        one,
        states={"dh": one.state(_at(one.step, 1)), "dc": one.state(_at(one.step, 2))},
        sequences=_sequences(
            one,
            f=f,
            to_c=emit.mul(o, slope(emit, out, squashed)),
            to_i=emit.mul(g, slope(emit, gate, i)),
            to_o=emit.mul(squashed, slope(emit, gate, o)),
            to_f=emit.mul(before, slope(emit, gate, f)),
            to_g=emit.mul(i, slope(emit, cell, g)),
        ),
        captured={
            "r": one.r,
            **({} if peepholes is None else dict(zip(("pi", "po", "pf"), peepholes, strict=True))),
        },
        body=_lstm_body(one, peepholes=peepholes is not None),
        results={"dz": 4 * hidden},
        backward=True,
    )
    parts = {**_weight_parts(one, dz), 5: states[0], 6: states[1]}
    if peepholes is not None:
        di, do, df, _ = one.split(dz, 4)
        terms = [emit.mul(di, before), emit.mul(do, c), emit.mul(df, before)]
        parts[7] = emit.op("Concat", *[emit.reduce_sum(t, [0, 1]) for t in terms], axis=0)
    return parts


def _peepholes(one: Direction) -> list[Tensor] | None:
    """The weights (1, H) from the cell to the input, output and forget gates."""
    given = one.step.input(7)
    if given is None:
        return None
    emit = one.emit
    picked = emit.op("Gather", given, emit.constant(one.index), axis=0)
    return [emit.unsqueeze(part, [0]) for part in one.split(picked, 3, axis=0)]


def _cells(
    one: Direction, zi: Tensor, zf: Tensor, g: Tensor, gate: str, peepholes: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The cell after and before each step, which the operator does not hand out."""
    emit = one.emit
    peep = """
        from_c = Mul(pi, c)
        si = Add(zi, from_c)
        to_f = Mul(pf, c)
        sf = Add(zf, to_f)
    """
    plain = """
        si = Identity(zi)
        sf = Identity(zf)
    """
    first = one.state(one.step.input(6))
    captured = {} if peepholes is None else {"pi": peepholes[0], "pf": peepholes[2]}
    _, (after,) = scan(
        one,
        states={"c": first},
        sequences={
            "zi": zi,
            "zf": zf,
            "g": g,
            **({} if one.mask is None else {"mask": one.mask}),
        },
        captured=captured,
        body=f"""
            {plain if peepholes is None else peep}
            i = {gate}(si)
            f = {gate}(sf)
            kept = Mul(f, c)
            new = Mul(i, g)
            step_c = Add(kept, new)
            {_stay(one, "c")}
            cell = Identity(next_c)
        """,
        results={"cell": one.hidden},
        backward=False,
    )
    before = emit.op("Concat", emit.unsqueeze(first, [0]), without_last(emit, after), axis=0)
    return after, before


def _lstm_body(one: Direction, *, peepholes: bool) -> str:
    dct, dc = "dct = Add(dc, from_h)", "step_dc = Mul(dct, f)"
    if peepholes:
        dct = """
            from_o = Mul(do, po)
            both = Add(from_h, from_o)
            dct = Add(dc, both)
        """
        dc = """
            kept = Mul(dct, f)
            from_i = Mul(di, pi)
            from_f = Mul(df, pf)
            gated = Add(from_i, from_f)
            step_dc = Add(kept, gated)
        """
    return f"""
        dht = Add(dh, dy)
        do = Mul(dht, to_o)
        from_h = Mul(dht, to_c)
        {dct}
        di = Mul(dct, to_i)
        df = Mul(dct, to_f)
        dg = Mul(dct, to_g)
        dz_step = Concat<axis = 1>(di, do, df, dg)
        {_cut(one)}
        step_dh = MatMul(dz_step, r)
        {dc}
        {_stay(one, "dh")}
        {_stay(one, "dc")}
    """


RECURRENT: dict[str, Rule] = {
    "GRU": gru,
    "LSTM": lstm,
    "RNN": rnn,
}
