"""SSD scan as matrix products over chunks, in plain PyTorch, with an explicit backward (backend ``"torch"``).

The sequence is walked slab by slab, so that the temporaries stay in cache and memory does not grow with the length. A
slab holds several chunks; its products are batched over them, and only the small matrix states are passed serially.
README.md derives the formulas. Inside a slab the names are those of the derivation and the layouts are

    head-major (c, b, g, r, q, ...)   natural (c, b, q, h, ...)   states (c, b, g, r * p, n)

with c chunks of q tokens, g groups of r heads. Chunk matrices are transposed: row j is the token that is read, column i
the token that is written.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.dispatch import exact_matmul, state_dtype
from seqssm.kernels.ssd.slabs import BLOCK, Part, grid, memory, parts


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    chunk: int | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, h, p), the final state (b, h, p, n), and the states that enter the slabs (empty unless saved)."""
    b, _, h, p = x.shape
    n = B.shape[3]
    final_state = x.new_empty(b, h, p, n, dtype=state_dtype(x.dtype))
    states = empty_states(x, B, chunk) if save_states else final_state.new_empty(0)
    y = x.new_empty(x.shape)
    with exact_matmul(x.device):
        step = _step_size(dt, dt_bias, dt_softplus, final_state.dtype)
        for part in parts(x, B, chunk, reverse):
            scan = _Scan(part, x, step, A, B, C, D, z, seq_idx)
            S = scan.pack_state(initial_state)
            for k in scan.slabs():
                if save_states:
                    states[k, part.rows, part.groups] = S
                S = scan.forward(k, S, y)
            scan.unpack_state(S, final_state)
    memory.trim()
    return y, final_state, states


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    chunk: int | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state, None where the input is."""
    dtype = states.dtype
    grads = _Gradients(
        x=x.new_empty(x.shape),
        B=B.new_empty(B.shape),
        C=C.new_empty(C.shape),
        z=None if z is None else z.new_empty(z.shape),
        step=dt.new_empty(dt.shape, dtype=dtype),
        # Sums over all tokens: a slab is summed in the working precision, the slabs in float64.
        A=A.new_zeros(A.shape, dtype=torch.float64),
        D=None if D is None else D.new_zeros(D.shape, dtype=torch.float64),
    )
    dinitial_state = None if initial_state is None else initial_state.new_empty(initial_state.shape, dtype=dtype)
    with exact_matmul(x.device):
        step = _step_size(dt, dt_bias, dt_softplus, dtype)
        for part in parts(x, B, chunk, reverse):
            scan = _Scan(part, x, step, A, B, C, D, z, seq_idx)
            dS = scan.pack_state(dfinal_state)
            for k in reversed(scan.slabs()):
                dS = scan.backward(k, states[k, part.rows, part.groups], dS, dy, grads)
            if dinitial_state is not None:
                scan.unpack_state(dS, dinitial_state)
        ddt = grads.step
        if dt_softplus:
            ddt *= -torch.expm1(-step)  # softplus'(v) = sigmoid(v) = 1 - exp(-softplus(v))
    memory.trim()
    ddt_bias = None if dt_bias is None else ddt.sum((0, 1), dtype=torch.float64)
    return grads.x, ddt, grads.A, grads.B, grads.C, grads.D, grads.z, ddt_bias, dinitial_state


def empty_states(x: Tensor, B: Tensor, chunk: int | None) -> Tensor:
    """Room for the states that enter the slabs, in the layout of this backend: (slabs, b, g, h/g * p, n)."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    slab = grid(x, chunk)[1]
    return x.new_empty(-(-l // slab), b, g, h // g * p, n, dtype=state_dtype(x.dtype))


@dataclass
class _Gradients:
    """Where the slabs write. ``step`` is the step size after bias and softplus; A and D are sums over all tokens."""

    x: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    step: Tensor
    A: Tensor
    D: Tensor | None


@dataclass
class _Slab:
    """What both passes need of one slab."""

    tokens: slice
    x: Tensor  # (c, b, q, h, p)
    z: Tensor | None  # (c, b, q, h, p)
    step: Tensor  # (c, b, q, h, 1)
    B: Tensor  # (c, b, g, q, n)
    C: Tensor  # (c, b, g, q, n)
    decay: Tensor  # (c, b, g, r, j, i): from token j to token i of a chunk, zero where i does not see j
    from_start: Tensor  # (c, b, q, h, 1): decay from the border where the scan enters the chunk to the token
    to_end: Tensor  # (c, b, q, h, 1): decay from the token to the border where the scan leaves
    through: Tensor  # (c, b, g, r): decay from border to border
    products: Tensor  # (c, b, g, 1, j, i): B_j . C_i


class _Scan:
    """One part's inputs, and the two passes over a slab of it."""

    def __init__(
        self,
        part: Part,
        x: Tensor,
        step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        seq_idx: Tensor | None,
    ) -> None:
        rows, groups, heads = part.rows, part.groups, part.heads
        self.part, self.dtype = part, step.dtype
        self.x, self.step = x[rows, :, heads], step[rows, :, heads]
        self.B, self.C = B[rows, :, groups], C[rows, :, groups]
        self.z = None if z is None else z[rows, :, heads]
        self.b, self.l, self.h, self.p = self.x.shape
        self.g, self.n = self.B.shape[2:]
        self.r = self.h // self.g
        self.A = A[heads].to(self.dtype)
        self.D = None if D is None else D[heads].to(self.dtype).view(self.h, -1)
        self.resets = None if seq_idx is None else _resets(seq_idx[rows], part.backwards)
        ones = torch.ones(part.chunk, part.chunk, dtype=self.dtype, device=x.device)
        # (j, i): token i sees token j, itself included.
        self.sees = ones.tril() if part.backwards else ones.triu()
        self.before = self.sees - torch.eye(part.chunk, dtype=self.dtype, device=x.device)
        # To add to log decays: within a block of tokens (j, i), and between whole blocks (J, I).
        blocks = part.chunk // BLOCK
        self.mask = self.sees[:BLOCK, :BLOCK].double().log()
        self.block_mask = self.before[:blocks, :blocks].double().log()
        self.last = 0 if part.backwards else -1  # of the tokens of a chunk, in scan direction

    def slabs(self) -> range:
        """Slab numbers in scan order."""
        count = -(-self.l // self.part.slab)
        return range(count - 1, -1, -1) if self.part.backwards else range(count)

    def pack_state(self, state: Tensor | None) -> Tensor:
        """This part of the public states (b, h, p, n), as (b, g, r * p, n)."""
        if state is None:
            return self.x.new_zeros(self.b, self.g, self.r * self.p, self.n, dtype=self.dtype)
        state = state[self.part.rows, self.part.heads].to(self.dtype)
        return state.reshape(self.b, self.g, self.r * self.p, self.n)

    def unpack_state(self, S: Tensor, out: Tensor) -> None:
        """Write S (b, g, r * p, n) into this part of ``out`` (b, h, p, n)."""
        out[self.part.rows, self.part.heads] = S.reshape(self.b, self.h, self.p, self.n)

    def forward(self, k: int, S: Tensor, y: Tensor) -> Tensor:
        """Write slab k of y. S (b, g, r * p, n) enters; the state that leaves is returned."""
        s = self._slab(k)
        own = self._matmul("own", s.decay.mul_(s.products).mT, self._by_head("drive", s.x, s.step))
        drive_end = self._by_group("drive_end", s.x, s.step * s.to_end)
        borders = self._pass("borders", self._matmul("given", drive_end.mT, s.B), s.through, S, self.part.backwards)
        out = self._output(s, own, self._matmul("carried", s.C, self._entering(borders).mT))
        if s.z is not None:
            out *= self._silu(s.z)
        self._store(y, s, out, self.part.heads)
        return borders[self.last].clone()

    def backward(self, k: int, S: Tensor, dS: Tensor, dy: Tensor, grads: _Gradients) -> Tensor:
        """Write slab k of the gradients. S enters the slab and dS is the adjoint of the state that leaves it, both
        (b, g, r * p, n); the adjoint of S is returned."""
        s = self._slab(k)
        part = self.part
        dout = self._chunks(dy[part.rows, s.tokens, part.heads])  # (c, b, q, h, p)
        drive = self._by_head("drive", s.x, s.step)  # (c, b, g, r, q, p)
        drive_end = self._by_group("drive_end", s.x, s.step * s.to_end)  # (c, b, g, q, r * p)
        borders = self._pass("borders", self._matmul("given", drive_end.mT, s.B), s.through, S, part.backwards)
        S = self._entering(borders)  # (c, b, g, r * p, n)
        carried = self._matmul("carried", s.C, S.mT)  # (c, b, g, q, r * p): S's share of y before its decay
        matrix = torch.mul(s.decay, s.products, out=self._room("matrix", s.decay.shape))
        if s.z is not None and grads.z is not None:
            out = self._output(s, self._matmul("own", matrix.mT, drive), carried).mul_(dout)
            torch.ops.aten.silu_backward(out, s.z, grad_input=out)
            self._store(grads.z, s, out, part.heads)
            dout = torch.mul(dout, self._silu(s.z), out=out)
        dout_heads = self._by_head("dout", dout)  # (c, b, g, r, q, p)
        dout_start = self._by_group("dout_start", dout, s.from_start)  # (c, b, g, q, r * p)
        given = self._matmul("given", dout_start.mT, s.C)
        adjoints = self._pass("adjoints", given, s.through, dS, not part.backwards)
        dS = self._leaving(adjoints)

        # Through the chunk's own matrix: first times the decays, as B and C need it, then the whole product.
        dmatrix = self._matmul("dmatrix", drive, dout_heads.mT).mul_(s.decay)  # (c, b, g, r, j, i)
        dproducts = dmatrix.sum(3)  # (c, b, g, j, i)
        dB = self._matmul("dBC", dproducts, s.C, plus=(drive_end, dS))
        self._store(grads.B, s, dB.transpose(2, 3), part.groups)
        dC = self._matmul("dBC", dproducts.mT, s.B, plus=(dout_start, S))
        self._store(grads.C, s, dC.transpose(2, 3), part.groups)
        dmatrix.mul_(s.products)
        own = self._natural(self._matmul("own", matrix, dout_heads))
        later = self._ungrouped(self._matmul("later", s.B, dS.mT))  # (c, b, q, h, p)
        ddrive = torch.addcmul(own, later, s.to_end, out=self._room("ddrive", later.shape))

        # The log decay of token k takes all that flows from before k to k or beyond. Sums of such flows rather than
        # differences of larger ones: nothing cancels.
        flow = self._matmul("matrix", dmatrix, self.sees.mT).mul_(self.before).sum(-2)  # (c, b, g, r, q)
        flow_in = self._small(self._ungrouped(carried.mul_(dout_start)).sum(-1))
        flow_out = self._small(later.mul_(self._ungrouped(drive_end)).sum(-1))
        inner = torch.mul(S, dS, out=self._room("given", S.shape))
        flow_through = inner.unflatten(3, (self.r, self.p)).sum((4, 5)) * s.through
        flow += flow_in @ self.sees.mT + flow_out @ self.before + flow_through.unsqueeze(-1)
        dlog = flow.flatten(2, 3).transpose(2, 3)  # (c, b, q, h)
        grads.A[part.heads] += (dlog * s.step.squeeze(-1)).sum((0, 1, 2))
        direct = torch.mul(s.x, ddrive, out=self._room("later", ddrive.shape)).sum(-1)
        self._store(grads.step, s, direct.addcmul_(dlog, self.A), part.heads)
        dx = ddrive.mul_(s.step)
        if self.D is not None and grads.D is not None:
            dx.addcmul_(dout, self.D)
            dD = torch.mul(dout, s.x, out=self._room("later", dx.shape)).sum((0, 1, 2))  # (h, p)
            grads.D[part.heads] += dD if grads.D.dim() == 2 else dD.sum(-1)
        self._store(grads.x, s, dx, part.heads)
        return adjoints[-1 - self.last].clone()

    def _slab(self, k: int) -> _Slab:
        part = self.part
        tokens = slice(k * part.slab, min((k + 1) * part.slab, self.l))
        step = self._chunks(self.step[:, tokens])  # (c, b, q, h)
        # Sums of log decays are taken in float64 and only their differences rounded, which are never positive.
        log = (step * self.A).transpose(2, 3).double() @ self.sees.double()  # (c, b, h, q)
        total = log[..., self.last]  # (c, b, h)
        from_start, to_end, through = (self._exp(v) for v in (log, total.unsqueeze(-1) - log, total))
        resets = None
        if self.resets is not None:
            resets = self._chunks(self.resets[:, tokens]) @ self.sees  # (c, b, q): how many up to this token
            all_resets = resets[..., self.last, None]  # (c, b, 1)
            from_start *= (resets == 0).unsqueeze(2)
            to_end *= (resets == all_resets).unsqueeze(2)
            through *= all_resets == 0
        B, C = (self._chunks(v[:, tokens]).transpose(2, 3) for v in (self.B, self.C))
        return _Slab(
            tokens=tokens,
            x=self._chunks(self.x[:, tokens]),
            z=None if self.z is None else self._chunks(self.z[:, tokens]),
            step=step.unsqueeze(-1),
            B=B,
            C=C,
            decay=self._decay_matrix(log, resets).unflatten(2, (self.g, self.r)),
            from_start=from_start.transpose(2, 3).unsqueeze(-1),
            to_end=to_end.transpose(2, 3).unsqueeze(-1),
            through=through.unflatten(2, (self.g, self.r)),
            products=self._matmul("products", B, C.mT).unsqueeze(3),
        )

    def _decay_matrix(self, log: Tensor, resets: Tensor | None) -> Tensor:
        """Decay from token j to token i of a chunk (c, b, h, j, i), zero where i does not see j.

        Only blocks of BLOCK tokens on the diagonal need an exponential for each entry. Off the diagonal the way from j
        to i leads over two block borders, and its decay is a product: a matrix of rank q / BLOCK.
        """
        backwards = self.part.backwards
        log = log.unflatten(-1, (-1, BLOCK))  # (c, b, h, m, s)
        leave = log[..., self.last]  # (c, b, h, m): up to the border where the scan leaves each block
        enter = F.pad(leave[..., 1:], [0, 1]) if backwards else F.pad(leave[..., :-1], [1, 0])
        to_border, from_border = self._exp(leave.unsqueeze(-1) - log), self._exp(log - enter.unsqueeze(-1))
        between = self._exp((enter.unsqueeze(-2) - leave.unsqueeze(-1)).add_(self.block_mask))  # (c, b, h, J, I)
        own = log.unsqueeze(-2) - log.unsqueeze(-1)  # (c, b, h, m, j, i)
        own += self.mask
        if resets is not None:
            resets = resets.unflatten(-1, (-1, BLOCK)).unsqueeze(2)  # (c, b, 1, m, s)
            left = resets[..., self.last]
            entered = F.pad(left[..., 1:], [0, 1]) if backwards else F.pad(left[..., :-1], [1, 0])
            to_border *= resets == left.unsqueeze(-1)
            from_border *= resets == entered.unsqueeze(-1)
            between *= entered.unsqueeze(-2) == left.unsqueeze(-1)
            own.masked_fill_(resets.unsqueeze(-2) != resets.unsqueeze(-1), -torch.inf)
        rows = (to_border.unsqueeze(-1) * between.unsqueeze(-2)).flatten(-3, -2)  # (c, b, h, j, I)
        columns = torch.diag_embed(from_border.transpose(-1, -2)).movedim(-3, -1).flatten(-2)  # (c, b, h, I, i)
        matrix = self._matmul("decay", rows, columns)
        diagonal = matrix.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).diagonal(0, -4, -2).movedim(-1, -3)
        diagonal.copy_(self._exp(own))
        return matrix

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return memory.get(name, shape, self.sees)

    def _exp(self, log: Tensor) -> Tensor:
        return log.to(self.dtype).exp_() if log.dtype != self.dtype else log.exp()

    def _silu(self, v: Tensor) -> Tensor:
        return torch.ops.aten.silu(v, out=self._room("silu", v.shape))

    def _matmul(self, name: str, left: Tensor, right: Tensor, plus: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``left @ right``, plus the product of ``plus``, batched over all but the last two dimensions, into the memory
        called ``name``."""
        out = self._room(name, (*left.shape[:-1], right.shape[-1]))
        if right.dim() == 2:
            return torch.mm(left.flatten(0, -2), right, out=out.flatten(0, -2)).view(out.shape)
        batch = out.flatten(0, -3)
        torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=batch)
        if plus is not None:
            batch.baddbmm_(plus[0].flatten(0, -3), plus[1].flatten(0, -3))
        return out

    def _output(self, s: _Slab, own: Tensor, carried: Tensor) -> Tensor:
        """Scan output with its skip (c, b, q, h, p), from the chunk's own part and the entering state's."""
        out = self._room("out", s.x.shape)
        torch.addcmul(self._natural(own), self._ungrouped(carried), s.from_start, out=out)
        return out if self.D is None else out.addcmul_(s.x, self.D)

    def _pass(self, name: str, given: Tensor, through: Tensor, edge: Tensor, descending: bool) -> Tensor:
        """States at the c + 1 borders of the chunks (c+1, b, g, r * p, n), from what each chunk gives to the next
        border (c, b, g, r * p, n) and the state at the first one; in descending order when ``descending``."""
        c = given.shape[0]
        borders = self._room(name, (c + 1, *given.shape[1:]))
        borders[c if descending else 0] = edge
        # One operation a chunk on whole states. Unbound at once: a chain of views would cost as much as the sums.
        state, gift = (v.unflatten(3, (self.r, self.p)).flatten(4).unbind() for v in (borders, given))
        decay = through.unsqueeze(-1).unbind()
        for i in range(c - 1, -1, -1) if descending else range(c):
            source, target = (i + 1, i) if descending else (i, i + 1)
            torch.addcmul(gift[i], state[source], decay[i], out=state[target])
        return borders

    def _entering(self, borders: Tensor) -> Tensor:
        """What each chunk receives in scan direction."""
        return borders[1:] if self.part.backwards else borders[:-1]

    def _leaving(self, borders: Tensor) -> Tensor:
        return borders[:-1] if self.part.backwards else borders[1:]

    def _chunks(self, v: Tensor) -> Tensor:
        """(b, t, ...) as (c, b, q, ...) in the working precision, the last chunk filled with zeros."""
        q = self.part.chunk
        v = v.to(self.dtype)
        missing = -v.shape[1] % q
        if missing:
            v = F.pad(v, [0, 0] * (v.dim() - 2) + [0, missing])
        return v.unflatten(1, (-1, q)).transpose(0, 1)

    def _store(self, out: Tensor, s: _Slab, v: Tensor, columns: slice) -> None:
        """Write v (c, b, q, ...) into this slab's place in ``out`` (b, l, heads or groups, ...)."""
        out = out[self.part.rows, s.tokens, columns]
        v = v.transpose(0, 1)
        if out.shape[1] % self.part.chunk:
            out.copy_(v.flatten(1, 2)[:, : out.shape[1]])
        else:
            out.unflatten(1, (-1, self.part.chunk)).copy_(v)

    def _small(self, v: Tensor) -> Tensor:
        """(c, b, q, h) as (c, b, g, r, q)."""
        return v.transpose(2, 3).unflatten(2, (self.g, self.r))

    def _by_head(self, name: str, v: Tensor, scale: Tensor | None = None) -> Tensor:
        """(c, b, q, h, p), times ``scale`` (c, b, q, h, 1), copied to (c, b, g, r, q, p)."""
        c, b, q, h, p = v.shape
        out = self._room(name, (c, b, h, q, p))
        if scale is None:
            out.copy_(v.transpose(2, 3))
        else:
            torch.mul(v.transpose(2, 3), scale.transpose(2, 3), out=out)
        return out.unflatten(2, (self.g, self.r))

    def _by_group(self, name: str, v: Tensor, scale: Tensor) -> Tensor:
        """(c, b, q, h, p), times ``scale`` (c, b, q, h, 1), copied to (c, b, g, q, r * p)."""
        c, b, q, _, p = v.shape
        out = self._room(name, (c, b, self.g, q, self.r, p))
        torch.mul(*(w.unflatten(3, (self.g, self.r)).transpose(2, 3) for w in (v, scale)), out=out)
        return out.flatten(4)

    def _natural(self, v: Tensor) -> Tensor:
        """(c, b, g, r, q, p) as (c, b, q, h, p)."""
        return v.flatten(2, 3).transpose(2, 3)

    def _ungrouped(self, v: Tensor) -> Tensor:
        """(c, b, g, q, r * p) as (c, b, q, h, p)."""
        return v.transpose(2, 3).unflatten(-1, (self.r, self.p)).flatten(3, 4)


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Step sizes (b, l, h) in the working precision."""
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    return F.softplus(step) if dt_softplus else step


def _resets(seq_idx: Tensor, backwards: bool) -> Tensor:
    """(b, l) bool: the state is dropped before this token. Never before the first in scan direction."""
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(changes, [0, 1] if backwards else [1, 0])
