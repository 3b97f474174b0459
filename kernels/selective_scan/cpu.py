"""Backend "numba": the selective scan compiled for the CPU, eight channels to a vector, the state in a register.

A task is a row of the batch and a few vectors of channels; ``cpu_kernels.py`` says what it does. Every sum has a fixed
order that does not depend on the number of threads. float32 inside; 16-bit inputs are converted first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.compiled import addressable, parallel
from seqssm.kernels.selective_scan.cpu_kernels import SCRATCH, backward_tasks, forward_tasks, step_tasks
from seqssm.kernels.selective_scan.op import CHUNK
from seqssm.kernels.simd import LANES, LOG2_E

# Gradients of B and C are sums over channels: at most this many tasks, of fixed extent, share the channels of a group,
# each with sums of its own, over SEGMENT tokens at a time.
_SHARES = 8
_SEGMENT = 16 * CHUNK


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), the final state (b, d, n) and the states entering every CHUNK tokens (b, chunks, d, n)."""
    b, l, d = u.shape
    n = A.shape[1]
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, reverse)
    y = torch.empty(b, l, d)
    state = torch.zeros(b, d, n) if initial_state is None else initial_state.detach().float().contiguous().clone()
    states = torch.empty((b, -(-l // CHUNK), d, n) if save_states else 0)
    results = tuple(x.data_ptr() for x in (y, state, states))
    parallel(
        forward_tasks,
        scan.tasks,
        y.numel() * n,
        SCRATCH,
        scan.sizes,
        scan.strides,
        scan.pointers,
        (*results, save_states),
    )
    return y.to(u.dtype), state, states


def backward(
    dy: Tensor,
    dfinal_state: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    b, l, d = u.shape
    g, n = B.shape[2:]
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, reverse)
    dy = addressable(dy)
    adjoint = dfinal_state.detach().float().contiguous().clone()  # of the state that leaves the chunk
    du, ddelta = torch.empty(b, l, d), torch.empty(b, l, d)
    dz = torch.empty((b, l, d) if z is not None else 0)
    dB, dC = torch.empty(b, l, g, n), torch.empty(b, l, g, n)
    dA = torch.zeros(b, d, n, dtype=torch.float64)
    dD, dbias = (torch.zeros(b, d, dtype=torch.float64) for _ in range(2))
    results = tuple(x.data_ptr() for x in (dy, states, adjoint, du, ddelta, dz, dA, dD, dbias))
    for start in reversed(range(0, l, _SEGMENT)):
        stop = min(start + _SEGMENT, l)
        sums = torch.zeros(scan.shares, b, g, stop - start, n, 2)
        strides = (*scan.strides, *dy.stride()[:2], start, stop)
        pointers = (*results, sums.data_ptr())
        parallel(backward_tasks, scan.tasks, 2 * du.numel() * n, SCRATCH, scan.sizes, strides, scan.pointers, pointers)
        for i, (r, part) in enumerate(zip(reverse, sums.sum(0).unbind(1), strict=True)):
            tokens = slice(l - stop, l - start) if r else slice(start, stop)
            dB[:, tokens, i], dC[:, tokens, i] = (part.flip(1) if r else part).unbind(-1)
    return (
        du,
        ddelta,
        dA.sum(0).float(),
        dB,
        dC,
        None if D is None else dD.sum(0).float(),
        None if z is None else dz,
        None if delta_bias is None else dbias.sum(0).float(),
        None if initial_state is None else adjoint,
    )


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """y (b, d) of one token; ``state`` (b, d, n) is updated in place. B, C (b, g, n)."""
    b, d, n = state.shape
    h = addressable(state)
    inputs = [addressable(x) for x in (h, u, delta, u if z is None else z, B, C, A)]
    parameters = [None if x is None else addressable(x) for x in (D, delta_bias)]
    y = torch.empty(b, d)
    sizes = (b, d, B.shape[1], n, int(delta_softplus), int(z is not None))
    strides = tuple(stride for x in inputs for stride in x.stride()[:-1])
    pointers = (*(x.data_ptr() for x in inputs), *(0 if x is None else x.data_ptr() for x in parameters), y.data_ptr())
    parallel(step_tasks, b, state.numel(), 3 * LANES, sizes, strides, pointers)
    if h.data_ptr() != state.data_ptr():
        state.copy_(h)
    return y.to(u.dtype)


class _Scan:
    """The operands as the compiled functions take them: sizes, strides and pointers, which live as long as this."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        seq_idx: Tensor | None,
        reverse: tuple[bool, ...],
    ) -> None:
        b, l, d = u.shape
        g, n = B.shape[2:]
        vectors = -(-(d // g) // LANES)  # of a group
        self.shares = min(vectors, _SHARES)
        self.tasks = b * g * self.shares
        flags = (int(delta_softplus), int(z is not None), int(seq_idx is not None))
        self.sizes = (b, l, d, g, n, vectors, self.shares, *flags)
        inputs = [addressable(x) for x in (u, delta, u if z is None else z, B, C)]
        self.strides = tuple(stride for x in inputs for stride in x.stride()[:-1])
        columns = [A.detach() * float(LOG2_E), *(A.new_zeros(d) if x is None else x.detach() for x in (D, delta_bias))]
        parameters = torch.cat([x.float().reshape(d, -1) for x in columns], dim=1).view(g, d // g, n + 2)
        parameters = F.pad(parameters, (0, 0, 0, vectors * LANES - d // g))
        parameters = parameters.view(g, vectors, LANES, n + 2).mT.contiguous()
        # One where the state is dropped between tokens t-1 and t.
        changes = torch.zeros(0, dtype=torch.uint8)
        if seq_idx is not None:
            changes = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.uint8), (1, 1))  # (b, l+1)
        self._tensors = (*inputs, parameters, changes, torch.tensor(reverse, dtype=torch.uint8))
        self.pointers = tuple(x.data_ptr() for x in self._tensors)
