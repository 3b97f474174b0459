"""Backend "numba": the causal convolution compiled for the CPU, eight channels to a vector.

A task is a few runs of tokens of one row of the batch. The forward pass adds up the k taps of a token straight from the
input, whose rows are still in the nearest cache. The backward pass makes the gradient before the activation for a run
and the k-1 tokens after it, then gathers: the gradient of an input is a sum over the tokens that saw it, so that
nothing is written twice. Sums over tokens have a fixed order that does not depend on the number of threads. float32
inside; 16-bit inputs are converted first.
"""

# The compiled functions take their types from Numba.
# mypy: allow-untyped-defs

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.compiled import addressable, inlined, kernel, parallel
from seqssm.kernels.simd import (
    LANES,
    ONE,
    ZERO,
    add_doubles,
    fmadd,
    get_byte,
    load,
    load_some,
    sigmoid,
    splat,
    store,
    store_some,
)

_RUN = 64  # tokens
_TASKS = 16  # or one a row of the batch; each sums the gradients of the weights by itself


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (b, d, k-1)."""
    b, l, d = x.shape
    conv = _Conv(x, weight, bias, activation, initial_state, seq_idx, reverse)
    y, final_state = torch.empty(b, l, d), torch.empty(b, d, weight.shape[1] - 1)
    results = (y.data_ptr(), final_state.data_ptr())
    parallel(_forward_tasks, conv.tasks, y.numel(), LANES, conv.sizes, conv.pointers, results)
    return y.to(x.dtype), final_state.to(x.dtype)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state."""
    b, l, d = x.shape
    k = weight.shape[1]
    conv = _Conv(x, weight, bias, activation, initial_state, seq_idx, reverse)
    dy = addressable(dy)
    dfinal_state = torch.zeros(b, d, k - 1) if dfinal_state is None else dfinal_state.detach().float().contiguous()
    dx, dinitial_state = torch.empty(b, l, d), torch.empty(b, d, k - 1)
    sums = torch.zeros(conv.tasks, *conv.parameters.shape, dtype=torch.float64)
    results = tuple(t.data_ptr() for t in (dy, dfinal_state, dx, dinitial_state, sums))
    # The gradient before the activation over a run and what follows it, the sums of a run, and a vector to spare.
    scratch = ((_RUN + k - 1 + k + 1) * conv.parameters.shape[1] + 1) * LANES
    parallel(
        _backward_tasks, conv.tasks, 4 * dx.numel(), scratch, conv.sizes, conv.pointers, (*results, *dy.stride()[:2])
    )
    gradient = sums.sum(0).float().mT.flatten(1, 2)[:, : d // len(reverse)].reshape(d, k + 1)
    dbias = None if bias is None else gradient[:, k]
    return dx, gradient[:, :k], dbias, None if initial_state is None else dinitial_state


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool) -> Tensor:
    """y (b, d) of one token; ``state`` (b, d, k-1) moves on in place."""
    b, d = x.shape
    window, x32, weight = addressable(state), addressable(x), addressable(weight)
    bias = None if bias is None else addressable(bias)
    y = torch.empty(b, d)
    sizes = (b, d, weight.shape[1], int(activation))
    strides = (*window.stride()[:2], x32.stride(0), weight.stride(0))
    pointers = (window.data_ptr(), x32.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    parallel(_step_tasks, b, y.numel(), LANES, sizes, strides, (*pointers, y.data_ptr()))
    if window.data_ptr() != state.data_ptr():
        state.copy_(window)
    return y.to(x.dtype)


class _Conv:
    """The operands as the compiled functions take them: sizes, strides and pointers, which live as long as this."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: bool,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        reverse: tuple[bool, ...],
    ) -> None:
        b, l, d = x.shape
        g, k = len(reverse), weight.shape[1]
        c = d // g
        vectors = -(-c // LANES)  # of a part of the channels
        shares = min(-(-l // _RUN), max(1, _TASKS // b))  # of a row
        self.tasks = b * shares
        x = addressable(x)
        flags = (int(activation), int(seq_idx is not None))
        self.sizes = (b, l, d, g, k, vectors, shares, *flags, *x.stride()[:2])
        columns = torch.cat([weight.detach(), (weight.new_zeros(d) if bias is None else bias.detach()).view(d, 1)], 1)
        parameters = F.pad(columns.float().view(g, c, k + 1), (0, 0, 0, vectors * LANES - c))
        self.parameters = parameters.view(g, vectors, LANES, k + 1).mT.contiguous()  # (g, vectors, k+1, LANES)
        state = torch.zeros(b, d, k - 1) if initial_state is None else initial_state.detach().float().contiguous()
        # One where tokens before t are hidden from t on.
        changes = torch.zeros(0, dtype=torch.uint8)
        if seq_idx is not None:
            changes = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.uint8), (1, 1))  # (b, l+1)
        self._tensors = (x, self.parameters, state, changes, torch.tensor(reverse, dtype=torch.uint8))
        self.pointers = tuple(t.data_ptr() for t in self._tensors)


# Tokens are counted in scan order; those of the state have the numbers -(k-1) to -1.


@inlined
def _hidden(changes, row, l, backwards, t):
    """Whether tokens before t are hidden from t on."""
    return t > 0 and t < l and get_byte(changes, row * (l + 1) + (l - t if backwards else t)) != 0


@inlined
def _seen_before(packed, changes, row, l, backwards, t, most):
    """How many tokens before t, up to ``most``, t sees."""
    if packed == 0:
        return most
    for r in range(most):
        if _hidden(changes, row, l, backwards, t - r):
            return r
    return most


@inlined
def _seen_after(packed, changes, row, l, backwards, t, most):
    """How many tokens after t, up to ``most`` and the end, see t."""
    most = min(most, l - 1 - t)
    if packed == 0:
        return most
    for r in range(most):
        if _hidden(changes, row, l, backwards, t + 1 + r):
            return r
    return most


@inlined
def _token(x, at, by, state, state_at, k, t, width, spare):
    """Channels of token t, from the input or from the state."""
    if t >= 0:
        return load_some(x, at + t * by, 1, width, spare)
    return load_some(state, state_at + t, k - 1, width, spare)


@inlined
def _taps(x, at, by, state, state_at, weights, k, t, seen, width, spare):
    """bias + sum over taps."""
    out = load(weights, k * LANES)
    if t >= seen and width == LANES:
        for r in range(seen + 1):
            out = fmadd(load(weights, (k - 1 - r) * LANES), load(x, at + (t - r) * by), out)
        return out
    for r in range(seen + 1):
        value = _token(x, at, by, state, state_at, k, t - r, width, spare)
        out = fmadd(load(weights, (k - 1 - r) * LANES), value, out)
    return out


@kernel
def _forward_tasks(first, last, spare, sizes, operands, results):
    _, l, d, g, k, vectors, shares, silu, packed, x_row, x_token = sizes
    x, parameters, state, changes, directions = operands
    y, final_state = results
    c = d // g
    runs = (l + _RUN - 1) // _RUN
    for task in range(first, last):
        share, row = task % shares, task // shares
        start, stop = runs * share // shares * _RUN, min(runs * (share + 1) // shares * _RUN, l)
        for group in range(g):
            backwards = get_byte(directions, group) != 0
            origin, sign = (l - 1, -1) if backwards else (0, 1)
            by = sign * x_token
            for t in range(start, stop):
                seen = _seen_before(packed, changes, row, l, backwards, t, k - 1)
                for index in range(vectors):
                    channel, width = group * c + index * LANES, min(LANES, c - index * LANES)
                    at, state_at = row * x_row + origin * x_token + channel, (row * d + channel) * (k - 1) + k - 1
                    weights = parameters + 4 * (group * vectors + index) * (k + 1) * LANES
                    out = _taps(x, at, by, state, state_at, weights, k, t, seen, width, spare)
                    if silu != 0:
                        out = out * sigmoid(out)
                    store_some(y, (row * l + origin + sign * t) * d + channel, 1, out, width, spare)
            if stop < l:
                continue
            for t in range(l - (k - 1), l):
                visible = _seen_after(packed, changes, row, l, backwards, t, k - 1) == l - 1 - t
                for index in range(vectors):
                    channel, width = group * c + index * LANES, min(LANES, c - index * LANES)
                    at, state_at = row * x_row + origin * x_token + channel, (row * d + channel) * (k - 1) + k - 1
                    value = _token(x, at, by, state, state_at, k, t, width, spare) if visible else splat(ZERO)
                    store_some(final_state, state_at + t - l, k - 1, value, width, spare)


@kernel
def _backward_tasks(first, last, douts, sizes, operands, results):
    _, l, d, g, k, vectors, shares, silu, packed, x_row, x_token = sizes
    x, parameters, state, changes, directions = operands
    dy, dfinal_state, dx, dinitial_state, sums, dy_row, dy_token = results
    c = d // g
    runs = (l + _RUN - 1) // _RUN
    own = douts + 4 * (_RUN + k - 1) * vectors * LANES  # the sums of a run, (vectors, k+1)
    spare = own + 4 * vectors * (k + 1) * LANES
    for task in range(first, last):
        share, row = task % shares, task // shares
        for piece in range(runs * share // shares * g, runs * (share + 1) // shares * g):
            run, group = piece // g, piece % g
            start, stop = run * _RUN, min((run + 1) * _RUN, l)
            backwards = get_byte(directions, group) != 0
            origin, sign = (l - 1, -1) if backwards else (0, 1)
            by, dy_by = sign * x_token, sign * dy_token
            for i in range(vectors * (k + 1)):
                store(own, i * LANES, splat(ZERO))
            for t in range(start, min(stop + k - 1, l)):
                seen = _seen_before(packed, changes, row, l, backwards, t, k - 1)
                for index in range(vectors):
                    channel, width = group * c + index * LANES, min(LANES, c - index * LANES)
                    at, state_at = row * x_row + origin * x_token + channel, (row * d + channel) * (k - 1) + k - 1
                    weights = parameters + 4 * (group * vectors + index) * (k + 1) * LANES
                    dout = load_some(dy, dy_row * row + origin * dy_token + channel + t * dy_by, 1, width, spare)
                    if silu != 0:
                        out = _taps(x, at, by, state, state_at, weights, k, t, seen, width, spare)
                        s = sigmoid(out)
                        dout = dout * s * fmadd(out, splat(ONE) - s, splat(ONE))
                    store(douts, ((t - start) * vectors + index) * LANES, dout)
                    if t < stop:
                        tap = (index * (k + 1) + k) * LANES
                        store(own, tap, load(own, tap) + dout)
                        for r in range(seen + 1):
                            value = _token(x, at, by, state, state_at, k, t - r, width, spare)
                            tap -= LANES
                            store(own, tap, fmadd(dout, value, load(own, tap)))
            for i in range(vectors * (k + 1)):
                sum_at = ((task * g + group) * vectors * (k + 1) + i) * LANES
                add_doubles(sums, sum_at, 1, load(own, i * LANES), LANES, spare)
            for t in range(-(k - 1) if run == 0 else start, stop):
                seen = _seen_after(packed, changes, row, l, backwards, t, k - 1)
                for index in range(vectors):
                    channel, width = group * c + index * LANES, min(LANES, c - index * LANES)
                    state_at = (row * d + channel) * (k - 1) + k - 1
                    weights = parameters + 4 * (group * vectors + index) * (k + 1) * LANES
                    gradient = splat(ZERO)
                    for r in range(max(0, -t), seen + 1):
                        dout = load(douts, ((t + r - start) * vectors + index) * LANES)
                        gradient = fmadd(load(weights, (k - 1 - r) * LANES), dout, gradient)
                    if t >= l - (k - 1) and seen == l - 1 - t:
                        gradient = gradient + load_some(dfinal_state, state_at + t - l, k - 1, width, spare)
                    if t >= 0:
                        here = (row * l + origin + sign * t) * d + channel
                        store_some(dx, here, 1, gradient, width, spare)
                    else:
                        store_some(dinitial_state, state_at + t, k - 1, gradient, width, spare)


@kernel
def _step_tasks(first, last, spare, sizes, strides, pointers):
    _, d, k, silu = sizes
    state_row, state_channel, x_row, weight_channel = strides
    state, x, weight, bias, y = pointers
    for row in range(first, last):
        for channel in range(0, d, LANES):
            width = min(LANES, d - channel)
            at, weight_at = row * state_row + channel * state_channel, channel * weight_channel
            value = load_some(x, row * x_row + channel, 1, width, spare)
            out = value * load_some(weight, weight_at + k - 1, weight_channel, width, spare)
            if bias != 0:
                out = out + load_some(bias, channel, 1, width, spare)
            # From the newest token to the oldest: each place takes what its successor held.
            for j in range(k - 2, -1, -1):
                older = load_some(state, at + j, state_channel, width, spare)
                out = fmadd(older, load_some(weight, weight_at + j, weight_channel, width, spare), out)
                store_some(state, at + j, state_channel, value, width, spare)
                value = older
            if silu != 0:
                out = out * sigmoid(out)
            store_some(y, row * d + channel, 1, out, width, spare)
