"""Backend "torch": the selective scan in plain tensor operations, portable and lean; gradients written by hand.

Tokens are taken in blocks, in scan order, with time leading and channels fastest: (K, b, g, n, c) for c = d/g channels
a group. A block's decays and drives are formed at once, the recurrence runs over the block in place, one fused
multiply-add for all channels and states at a time, and the read-out is a batched matrix product. Nothing of size
(l, d, n) ever exists. No decay is divided by and no exponential of a sum is taken, so nothing can overflow that the
sequential recurrence would not.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.dispatch import exact_matmul, state_dtype
from seqssm.kernels.selective_scan.op import CHUNK

# Elements of one working tensor; the batch is taken in slices that stay under it.
_WORKING_SET = {"cpu": 1 << 22, "cuda": 1 << 26}


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
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final_state = u.new_empty(b, d, n, dtype=scan.dtype)
    states = u.new_empty((b, -(-l // CHUNK), d, n) if save_states else 0, dtype=scan.dtype)
    with exact_matmul(u.device):
        for rows in scan.batch_slices():
            h = scan.enter(initial_state, rows)
            work = scan.workspace(rows, 2)
            for start in range(0, l, CHUNK):
                if save_states:
                    states[rows, start // CHUNK] = scan.leave(h)
                block = _Block(scan, rows, start, min(start + CHUNK, l), work[0])
                history = block.run(h, work[1])
                scan.write(y, rows, start, block.gate(block.read_out(history)))
                h = history[-1].clone()
            final_state[rows] = scan.leave(h)
    return y, final_state, states


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
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; blocks are recomputed, last to first."""
    b, l, d = u.shape
    n = A.shape[1]
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, reverse)
    du, ddelta, dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, B, C))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dA = torch.zeros_like(scan.A)  # (g, n, c)
    dD, ddelta_bias = (u.new_zeros(d, dtype=scan.dtype).view(scan.g, 1, -1) for _ in range(2))
    dinitial_state = u.new_empty(b, d, n, dtype=scan.dtype)
    with exact_matmul(u.device):
        for rows in scan.batch_slices():
            carry = scan.enter(dfinal_state, rows)  # gradient of the state that leaves the block
            work = scan.workspace(rows, 3)
            for start in reversed(range(0, l, CHUNK)):
                block = _Block(scan, rows, start, min(start + CHUNK, l), work[0])
                entry = scan.enter(states[:, start // CHUNK], rows)
                history = block.run(entry, work[1])
                dout = scan.read(dy, rows, start, block.stop)  # (K, b, g, 1, c)
                if dz is not None and block.z is not None:
                    sigmoid = torch.sigmoid(block.z)
                    silu_slope = sigmoid * (1 + block.z * (1 - sigmoid))
                    scan.write(dz, rows, start, dout * block.read_out(history) * silu_slope)
                    dout = dout * block.z * sigmoid
                scan.write_shared(dC, rows, start, history @ dout.mT)
                adjoint = block.run_back(dout, carry, work[2])
                scan.write_shared(dB, rows, start, adjoint @ block.drive.mT)
                ddrive = block.B.mT @ adjoint
                carry = block.decay[0] * adjoint[0]
                # Gradient of the logarithm of the decay, delta A, in place of the adjoint.
                dlog = adjoint.mul_(block.decay)
                dlog[0].mul_(entry)
                dlog[1:].mul_(history[:-1])
                dstep = torch.mul(dlog, scan.A, out=history).sum(-2, keepdim=True)
                dstep.addcmul_(ddrive, block.u)
                dA += dlog.mul_(block.step).sum((0, 1))
                if delta_softplus:
                    dstep *= torch.sigmoid(block.delta)
                ddelta_bias += dstep.sum((0, 1))
                scan.write(ddelta, rows, start, dstep)
                dinput = ddrive * block.step
                if scan.D is not None:
                    dD += (dout * block.u).sum((0, 1))
                    dinput.addcmul_(dout, scan.D)
                scan.write(du, rows, start, dinput)
            dinitial_state[rows] = scan.leave(carry)
    return (
        du,
        ddelta,
        dA.mT.reshape(d, n),
        dB,
        dC,
        None if D is None else dD.flatten(),
        dz,
        None if delta_bias is None else ddelta_bias.flatten(),
        None if initial_state is None else dinitial_state,
    )


class _Scan:
    """The operands, and the order of tokens in each group."""

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
        self.b, self.l, self.d = u.shape
        self.g, self.n = B.shape[2:]
        self.dtype = state_dtype(u.dtype)
        self.reverse = reverse
        self.u, self.delta, self.z, self.B, self.C = u, delta, z, B, C
        self.A = A.to(self.dtype).unflatten(0, (self.g, -1)).mT.contiguous()  # (g, n, c)
        self.D, self.delta_bias = (
            None if x is None else x.to(self.dtype).view(self.g, 1, -1) for x in (D, delta_bias)
        )  # (g, 1, c)
        self.delta_softplus = delta_softplus
        self.keep = None if seq_idx is None else self._keep(seq_idx)
        self.device = u.device.type

    def _keep(self, seq_idx: Tensor) -> Tensor:
        """(b, l, g) one where the state of the token before, in scan order, is kept, zero where it is dropped."""
        same = (seq_idx[:, 1:] == seq_idx[:, :-1]).to(self.dtype)
        ahead, back = F.pad(same, (1, 0), value=1.0), F.pad(same, (0, 1), value=1.0)
        return torch.stack([back if r else ahead for r in self.reverse], dim=2)

    def batch_slices(self) -> Iterator[slice]:
        """Slices of the batch whose blocks stay within the working set."""
        size = max(1, _WORKING_SET.get(self.device, 1 << 22) // (CHUNK * self.d * self.n))
        return (slice(row, row + size) for row in range(0, self.b, size))

    def workspace(self, rows: slice, count: int) -> list[Tensor]:
        """Buffers (K, b, g, n, c) for all blocks of a slice: fresh memory costs more than the arithmetic on it."""
        shape = (min(CHUNK, self.l), len(range(self.b)[rows]), *self.A.shape)
        return [self.A.new_empty(shape) for _ in range(count)]

    def read(self, x: Tensor, rows: slice, start: int, stop: int) -> Tensor:
        """Tokens start..stop in scan order of (b, l, d), as (K, b, g, 1, c)."""
        return self.read_groups(x.unflatten(-1, (self.g, -1)), rows, start, stop).unsqueeze(-2)

    def read_groups(self, x: Tensor, rows: slice, start: int, stop: int) -> Tensor:
        """Tokens start..stop in scan order of (b, l, g, ...), time leading, in the dtype of computation."""
        ahead = x[rows, start:stop].transpose(0, 1)
        if any(self.reverse):
            back = x[rows, self.l - stop : self.l - start].flip(1).transpose(0, 1)
            parts = [back[:, :, i] if r else ahead[:, :, i] for i, r in enumerate(self.reverse)]
            ahead = back if all(self.reverse) else torch.stack(parts, dim=2)
        return ahead.to(self.dtype)

    def write(self, out: Tensor, rows: slice, start: int, value: Tensor) -> None:
        """Store a block (K, b, g, 1, c) into (b, l, d)."""
        self._write_groups(out.unflatten(-1, (self.g, -1)), rows, start, value.squeeze(-2))

    def write_shared(self, out: Tensor, rows: slice, start: int, value: Tensor) -> None:
        """Store a block (K, b, g, n, 1) into (b, l, g, n)."""
        self._write_groups(out, rows, start, value.squeeze(-1))

    def _write_groups(self, out: Tensor, rows: slice, start: int, value: Tensor) -> None:
        stop = start + value.shape[0]
        value = value.transpose(0, 1)
        if not any(self.reverse):
            out[rows, start:stop] = value
            return
        for i, r in enumerate(self.reverse):
            if r:
                out[rows, self.l - stop : self.l - start, i] = value[:, :, i].flip(1)
            else:
                out[rows, start:stop, i] = value[:, :, i]

    def enter(self, state: Tensor | None, rows: slice) -> Tensor:
        """(b, d, n) -> a new (b, g, n, c); zeros for None."""
        if state is None:
            size = len(range(self.b)[rows])
            return self.A.new_zeros(size, *self.A.shape)
        return state[rows].to(self.dtype).unflatten(1, (self.g, -1)).mT.contiguous()

    def leave(self, h: Tensor) -> Tensor:
        """(b, g, n, c) -> (b, d, n)."""
        return h.mT.flatten(1, 2)


class _Block:
    """What a block of tokens needs: step, drive, decay; and the recurrence over it in both directions."""

    def __init__(self, scan: _Scan, rows: slice, start: int, stop: int, work: Tensor) -> None:
        self.scan, self.stop = scan, stop
        self.u = scan.read(scan.u, rows, start, stop)  # (K, b, g, 1, c)
        self.delta = scan.read(scan.delta, rows, start, stop)
        if scan.delta_bias is not None:
            self.delta = self.delta + scan.delta_bias
        self.step = F.softplus(self.delta) if scan.delta_softplus else self.delta
        self.drive = self.step * self.u
        self.B, self.C = (scan.read_groups(x, rows, start, stop).unsqueeze(-1) for x in (scan.B, scan.C))
        self.z = None if scan.z is None else scan.read(scan.z, rows, start, stop)
        self.decay = torch.mul(self.step, scan.A, out=work[: stop - start]).exp_()  # (K, b, g, n, c)
        if scan.keep is not None:
            self.decay *= scan.read_groups(scan.keep, rows, start, stop)[..., None, None]

    def run(self, h: Tensor, work: Tensor) -> Tensor:
        """States after each token (K, b, g, n, c), from the state ``h`` (b, g, n, c) before the first."""
        history = torch.mul(self.B, self.drive, out=work[: len(self.B)])
        for decay_t, h_t in zip(self.decay.unbind(), history.unbind(), strict=True):
            h = h_t.addcmul_(decay_t, h)
        return history

    def run_back(self, dout: Tensor, carry: Tensor, work: Tensor) -> Tensor:
        """Gradients of the states after each token, given those of the read-out and of the last state."""
        adjoint = torch.mul(self.C, dout, out=work[: len(self.C)])
        adjoint[-1] += carry
        # adjoint_t += decay_{t+1} adjoint_{t+1}: the same recurrence from the last token, with the decays one ahead.
        tokens, decays = adjoint.unbind(), self.decay.unbind()
        for t in range(len(tokens) - 2, -1, -1):
            tokens[t].addcmul_(decays[t + 1], tokens[t + 1])
        return adjoint

    def read_out(self, history: Tensor) -> Tensor:
        """C h + D u, (K, b, g, 1, c)."""
        out = self.C.mT @ history
        return out if self.scan.D is None else out.addcmul_(self.u, self.scan.D)

    def gate(self, out: Tensor) -> Tensor:
        return out if self.z is None else out * F.silu(self.z)
