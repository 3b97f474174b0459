# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the backward SSD scan; ``triton_forward`` explains the layouts, README.md derives the formulas.

``keep_kernel`` writes S, the state entering each chunk, and R, the adjoint leaving it. With both, every chunk is on its
own: ``input_kernel`` takes one head, ``sum_kernel`` adds the heads of a group.
"""

import triton
import triton.language as tl

from seqssm.kernels.ssd.triton_forward import (
    chunk_decays,
    chunk_state,
    decay_matrix,
    load_state,
    load_tokens,
    locate,
    offsets,
    store_state,
    store_tokens,
    walk_segment,
)
from seqssm.kernels.triton_tiles import LOG2E, sigmoid


@triton.jit
def gated(dy, z):
    """The gradient of the scan's output behind the gate silu(z)."""
    z = z.to(tl.float32)
    return dy.to(tl.float32) * (z * sigmoid(z))


@triton.jit
def softplus_slope(step):
    """The slope of softplus where its value is ``step``: 1 - exp(-step), by its series where that would cancel."""
    series = step * (1 / 720) - 1 / 120
    series = step * series + 1 / 24
    series = step * series - 1 / 6
    series = step * series + 1 / 2
    series = step * (1.0 - step * series)
    return tl.where(step < 0.125, series, 1.0 - tl.exp2(step * -LOG2E))


@triton.jit(do_not_specialize=["length", "chunks", "first", "segments", "per_segment", "reverse_mask"])
def keep_kernel(
    x, dy, B, C, z, steps, logs, resets, states, adjoint, entering, leaving, dinitial,
    x_b, x_t, x_h, x_p, dy_b, dy_t, dy_h, dy_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, z_b, z_t, z_h, z_p,
    states_b, states_s, states_h, states_n, states_p, adjoint_b, adjoint_s, adjoint_h, adjoint_n, adjoint_p,
    length, chunks, first, segments, per_segment, heads, per_group, p, n, reverse_mask,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Walk segments from S entering them, in ``states``, and as many from R leaving them, in ``adjoint``.

    Keeps S entering each chunk in ``entering`` and R leaving it in ``leaving``, both (b, chunks, h, blocks, BLOCK_N,
    BLOCK_P). The first segment of all writes R entering it to ``dinitial`` (b, h, p, n).
    """
    pid = tl.program_id(0)
    half = tl.num_programs(0) // 2
    batch, s, head, block = locate(pid % half, heads, segments, BLOCKS)
    begin = (first + s) * per_segment
    count = tl.minimum(per_segment, chunks - begin)
    if pid < half:
        if states is not None:
            states += batch * states_b + (first + s).to(tl.int64) * states_s + head.to(tl.int64) * states_h
        S = load_state(states, n, p, block, states_n, states_p, BLOCK_N, BLOCK_P)
        walk_segment(
            x, None, B, steps, logs, resets, S, entering, batch, head, block,
            begin, count, s * per_segment, segments * per_segment,
            x_b, x_t, x_h, x_p, 0, 0, 0, 0, B_b, B_t, B_g, B_n,
            length, chunks, heads, per_group, p, n, reverse_mask,
            False, True, EXACT, CHUNK, BLOCK_N, BLOCK_P, BLOCKS,
        )  # fmt: skip
    else:
        if adjoint is not None:
            adjoint += batch * adjoint_b + (first + s).to(tl.int64) * adjoint_s + head.to(tl.int64) * adjoint_h
        R = load_state(adjoint, n, p, block, adjoint_n, adjoint_p, BLOCK_N, BLOCK_P)
        R, _ = walk_segment(
            dy, z, C, steps, logs, resets, R, leaving, batch, head, block,
            begin, count, s * per_segment, segments * per_segment,
            dy_b, dy_t, dy_h, dy_p, z_b, z_t, z_h, z_p, C_b, C_t, C_g, C_n,
            length, chunks, heads, per_group, p, n, reverse_mask,
            True, True, EXACT, CHUNK, BLOCK_N, BLOCK_P, BLOCKS,
        )  # fmt: skip
        if dinitial is not None:  # noqa: SIM102  # known when compiling
            if first + s == 0:
                store_state(dinitial + (batch * heads + head) * (n * p), n, p, block, 1, n, R, BLOCK_N, BLOCK_P)


@triton.jit(do_not_specialize=["length", "chunks", "first", "kept_chunks", "rows", "reverse_mask"])
def input_kernel(
    x, dy, A, B, C, D, z, steps, logs, resets, entering, leaving, dx, dz, ddt, sums, dD,
    x_b, x_t, x_h, x_p, dy_b, dy_t, dy_h, dy_p, A_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, D_h, D_p,
    z_b, z_t, z_h, z_p,
    length, chunks, first, kept_chunks, rows, heads, per_group, p, n, reverse_mask,
    SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and head but those of B and C, from S ``entering`` it and R ``leaving`` it.

    Writes dx, dz (b, l, h, p), ddt (b, l, h) and the chunk's share of dA, of ddt_bias and of dD in ``sums`` (3, h,
    rows), rows = b * chunks; for a D with CHANNELS the last goes to ``dD`` (rows, h, blocks * BLOCK_P). ``first`` is
    the number of the first kept chunk.
    """
    pid = tl.program_id(0)
    head = pid % heads
    c = pid // heads % kept_chunks
    batch = (pid // (heads * kept_chunks)).to(tl.int64)
    rows = rows.to(tl.int64)
    if first + c < chunks:
        group = head // per_group
        direction = 1 - 2 * ((reverse_mask >> group) & 1)
        t = (first + c) * CHUNK
        i = tl.arange(0, CHUNK)
        at = (batch * heads + head) * (chunks * CHUNK) + t
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        out_t = heads * p
        out_b = length.to(tl.int64) * out_t
        row = batch * chunks + first + c
        dtype = tl.float32 if EXACT else x.dtype.element_ty
        step = tl.load(steps + at + i)
        from_start, to_end, through = chunk_decays(logs, resets, at, CHUNK)
        B_columns, real = offsets(group, B_g, 0, BLOCK_N, n, B_n)
        C_columns, _ = offsets(group, C_g, 0, BLOCK_N, n, C_n)
        key = load_tokens(B, batch, t, length, direction, B_b, B_t, B_columns, real, CHUNK).to(dtype)
        query = load_tokens(C, batch, t, length, direction, C_b, C_t, C_columns, real, CHUNK).to(dtype)
        matrix = tl.dot(key, tl.trans(query), input_precision="ieee")  # (j, i), as everything below
        matrix *= decay_matrix(logs, resets, at, True, CHUNK)
        across = tl.full((), 0.0, tl.float32)
        skip_sum = tl.full((), 0.0, tl.float32)
        balance = tl.zeros([CHUNK], tl.float32)
        flow_out = tl.zeros([CHUNK], tl.float32)
        dstep = tl.zeros([CHUNK], tl.float32)
        for block in range(BLOCKS):
            at_kept = chunk_state(0, batch, c, kept_chunks, head, heads, block, BLOCKS, BLOCK_N * BLOCK_P)
            columns, inside = offsets(head, x_h, block * BLOCK_P, BLOCK_P, p, x_p)
            dy_columns, inside = offsets(head, dy_h, block * BLOCK_P, BLOCK_P, p, dy_p)
            out_columns, inside = offsets(head, p, block * BLOCK_P, BLOCK_P, p, 1)
            S = tl.load(entering + at_kept + inner)
            R = tl.load(leaving + at_kept + inner)
            value = load_tokens(x, batch, t, length, direction, x_b, x_t, columns, inside, CHUNK)
            dout = load_tokens(dy, batch, t, length, direction, dy_b, dy_t, dy_columns, inside, CHUNK)
            if D is not None:
                skip_columns, inside = offsets(head, D_h, block * BLOCK_P, BLOCK_P, p, D_p)
                skip = tl.load(D + skip_columns, mask=inside, other=0.0).to(tl.float32)

            # The order keeps few matrices alive at a time. Through the state that enters:
            across += tl.sum(S.to(tl.float32) * R.to(tl.float32))
            carried = tl.dot(query, S.to(dtype), input_precision="ieee") * from_start[:, None]
            if z is not None:
                z_columns, inside = offsets(head, z_h, block * BLOCK_P, BLOCK_P, p, z_p)
                gate = load_tokens(z, batch, t, length, direction, z_b, z_t, z_columns, inside, CHUNK).to(tl.float32)
                read = tl.trans((matrix * step[:, None]).to(dtype))
                out = tl.dot(read, value.to(dtype), acc=carried, input_precision="ieee")
                if D is not None:
                    out += value.to(tl.float32) * skip[None, :]
                share = sigmoid(gate)
                dgate = dout.to(tl.float32) * out * (share * (1.0 + gate * (1.0 - share)))
                store_tokens(dz, batch, t, length, direction, out_b, out_t, out_columns, inside, dgate, CHUNK)
                dscan = dout.to(tl.float32) * (gate * share)
            else:
                dscan = dout.to(tl.float32)
            balance += tl.sum(carried * dscan, axis=1)
            if D is not None:
                if CHANNELS:
                    at_skip = (row * heads + head) * (BLOCKS * BLOCK_P) + block * BLOCK_P + tl.arange(0, BLOCK_P)
                    tl.store(dD + at_skip, tl.sum(dscan * value.to(tl.float32), axis=0))
                else:
                    skip_sum += tl.sum(dscan * value.to(tl.float32))
            dout = dscan.to(dtype)

            # Through the chunk's own matrix. The log decay of token k takes all that flows from before k to k or
            # beyond: with the diagonal left out, what tokens from k on receive less what they give.
            flow = tl.dot(value.to(dtype), tl.trans(dout), input_precision="ieee") * matrix
            dstep += tl.sum(flow, axis=1)
            flow = tl.where(i[:, None] < i[None, :], flow * step[:, None], 0.0)
            balance += tl.sum(flow, axis=0) - tl.sum(flow, axis=1)

            # Through the state that leaves.
            ddrive = tl.dot(key, R.to(dtype), input_precision="ieee") * to_end[:, None]
            later = tl.sum(ddrive * value.to(tl.float32), axis=1)
            flow_out += later * step
            dstep += later
            ddrive = tl.dot(matrix.to(dtype), dout, acc=ddrive, input_precision="ieee")
            dvalue = ddrive * step[:, None]
            if D is not None:
                dvalue += dout.to(tl.float32) * skip[None, :]
            store_tokens(dx, batch, t, length, direction, out_b, out_t, out_columns, inside, dvalue, CHUNK)
        dlog = tl.cumsum(balance, axis=0, reverse=True) + (tl.cumsum(flow_out, axis=0) - flow_out)
        dlog += across * tl.exp2(through)
        dstep += tl.load(A + head.to(tl.int64) * A_h).to(tl.float32) * dlog
        if SOFTPLUS:
            dstep *= softplus_slope(step)
        dstep = tl.where(t + i < length, dstep, 0.0)
        tl.store(sums + head * rows + row, tl.sum(step * dlog))
        tl.store(sums + (heads + head) * rows + row, tl.sum(dstep))
        tl.store(sums + (2 * heads + head) * rows + row, skip_sum)
        token = tl.where(direction > 0, t + i, length - 1 - t - i).to(tl.int64)
        at_ddt = (batch * length + token) * heads + head
        tl.store(ddt + at_ddt, dstep.to(ddt.dtype.element_ty), mask=t + i < length)


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(sums, dA, dbias, dD, rows, heads, BLOCK: tl.constexpr):
    """Add up one row of ``sums`` (3, h, rows) into dA, ddt_bias or dD (h,), of which the last two may be None."""
    pid = tl.program_id(0)
    which = pid // heads
    lane = tl.arange(0, BLOCK)
    sums += pid.to(tl.int64) * rows
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, rows, BLOCK):
        total += tl.load(sums + i + lane, mask=i + lane < rows, other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(dA + pid, result.to(dA.dtype.element_ty))
    if dbias is not None:  # noqa: SIM102  # known when compiling
        if which == 1:
            tl.store(dbias + pid - heads, result.to(dbias.dtype.element_ty))
    if dD is not None:  # noqa: SIM102  # known when compiling
        if which == 2:
            tl.store(dD + pid - 2 * heads, result.to(dD.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "chunks", "first", "kept_chunks", "dB_s", "reverse_mask"])
def sum_kernel(
    x, dy, B, C, z, steps, logs, resets, entering, leaving, dB, dC,
    x_b, x_t, x_h, x_p, dy_b, dy_t, dy_h, dy_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, z_b, z_t, z_h, z_p, dB_s,
    length, chunks, first, kept_chunks, splits, heads, per_group, p, n, reverse_mask,
    EXACT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PADDED_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dB and dC (splits, b, l, g, n) of one chunk, BLOCK_N states and one of ``splits`` parts of a group's heads.

    ``first`` is the number of the first kept chunk, ``dB_s`` the stride of the splits.
    """
    state_blocks: tl.constexpr = PADDED_N // BLOCK_N
    groups = heads // per_group
    pid = tl.program_id(0)
    state_block = pid % state_blocks
    split = pid // state_blocks % splits
    group = pid // (state_blocks * splits) % groups
    c = pid // (state_blocks * splits * groups) % kept_chunks
    batch = (pid // (state_blocks * splits * groups * kept_chunks)).to(tl.int64)
    if first + c < chunks:
        direction = 1 - 2 * ((reverse_mask >> group) & 1)
        t = (first + c) * CHUNK
        i = tl.arange(0, CHUNK)
        dtype = tl.float32 if EXACT else x.dtype.element_ty
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        inner += state_block * (BLOCK_N * BLOCK_P)
        products = tl.zeros([CHUNK, CHUNK], tl.float32)  # (j, i)
        dkey = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        dquery = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        per_split = per_group // splits
        for k in range(per_split * BLOCKS):
            head = group * per_group + split * per_split + k // BLOCKS
            block = k % BLOCKS
            columns, inside = offsets(head, x_h, block * BLOCK_P, BLOCK_P, p, x_p)
            dy_columns, _ = offsets(head, dy_h, block * BLOCK_P, BLOCK_P, p, dy_p)
            at = (batch * heads + head) * (chunks * CHUNK) + t
            at_kept = chunk_state(0, batch, c, kept_chunks, head, heads, block, BLOCKS, PADDED_N * BLOCK_P)
            value = load_tokens(x, batch, t, length, direction, x_b, x_t, columns, inside, CHUNK)
            dout = load_tokens(dy, batch, t, length, direction, dy_b, dy_t, dy_columns, inside, CHUNK)
            S = tl.load(entering + at_kept + inner).to(dtype)
            R = tl.load(leaving + at_kept + inner).to(dtype)
            if z is not None:
                z_columns, _ = offsets(head, z_h, block * BLOCK_P, BLOCK_P, p, z_p)
                dout = gated(dout, load_tokens(z, batch, t, length, direction, z_b, z_t, z_columns, inside, CHUNK))
            step = tl.load(steps + at + i)
            from_start, to_end, _ = chunk_decays(logs, resets, at, CHUNK)
            dmatrix = tl.dot(value.to(dtype), tl.trans(dout.to(dtype)), input_precision="ieee")
            products += dmatrix * (decay_matrix(logs, resets, at, True, CHUNK) * step[:, None])
            drive = (value.to(tl.float32) * (step * to_end)[:, None]).to(dtype)
            dkey = tl.dot(drive, tl.trans(R), acc=dkey, input_precision="ieee")
            drive = (dout.to(tl.float32) * from_start[:, None]).to(dtype)
            dquery = tl.dot(drive, tl.trans(S), acc=dquery, input_precision="ieee")
        B_columns, real = offsets(group, B_g, state_block * BLOCK_N, BLOCK_N, n, B_n)
        C_columns, _ = offsets(group, C_g, state_block * BLOCK_N, BLOCK_N, n, C_n)
        query = load_tokens(C, batch, t, length, direction, C_b, C_t, C_columns, real, CHUNK).to(dtype)
        dkey = tl.dot(products.to(dtype), query, acc=dkey, input_precision="ieee")
        key = load_tokens(B, batch, t, length, direction, B_b, B_t, B_columns, real, CHUNK).to(dtype)
        dquery = tl.dot(tl.trans(products.to(dtype)), key, acc=dquery, input_precision="ieee")
        out_t = groups * n
        out_b = length.to(tl.int64) * out_t
        out_columns, _ = offsets(group, n, state_block * BLOCK_N, BLOCK_N, n, 1)
        out_columns += split.to(tl.int64) * dB_s
        store_tokens(dB, batch, t, length, direction, out_b, out_t, out_columns, real, dkey, CHUNK)
        store_tokens(dC, batch, t, length, direction, out_b, out_t, out_columns, real, dquery, CHUNK)
