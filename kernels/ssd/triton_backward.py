# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the backward SSD scan; ``triton_forward`` explains the layouts, README.md derives the formulas.

``walk_kernel`` has kept S, the state entering each chunk, and the adjoint that each segment makes has been passed over
the segments. ``input_kernel`` then walks every segment last chunk to first with the adjoint R and keeps R for
``sum_kernel``, which takes each chunk by itself and adds the heads of a group.
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
)
from seqssm.kernels.triton_tiles import sigmoid


@triton.jit
def gated(dy, z):
    """The gradient of the scan's output behind the gate silu(z)."""
    z = z.to(tl.float32)
    return dy.to(tl.float32) * (z * sigmoid(z))


@triton.jit(do_not_specialize=["length", "chunks", "first", "segments", "per_segment", "reverse_mask"])
def input_kernel(
    x, dy, A, B, C, D, z, steps, logs, resets, adjoint, entering, leaving, dx, dz, dsteps, dA, dD, dinitial,
    x_b, x_t, x_h, x_p, dy_b, dy_t, dy_h, dy_p, A_h, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, D_h, D_p,
    z_b, z_t, z_h, z_p,
    length, chunks, first, segments, per_segment, heads, per_group, p, n, reverse_mask,
    CHANNELS: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment but those of B and C, and R leaving each chunk, kept in ``leaving``.

    ``adjoint`` (b, segments, h, n, p) is R leaving the segment, ``entering`` S entering each chunk; both kept states
    are (b, chunks, h, blocks, BLOCK_N, BLOCK_P). Writes dx, dz (b, l, h, p), the gradient of the step sizes as
    ``dsteps`` (b, h, blocks, t), and sums over the segment: dA (b, segments, h, blocks), dD of the same shape or, for a
    D with CHANNELS, (b, segments, h, blocks, BLOCK_P). The first segment of all writes R entering it to ``dinitial``
    (b, h, n, p).
    """
    batch, s, head, block = locate(heads, segments, BLOCKS)
    group = head // per_group
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    columns, inside = offsets(head, x_h, block * BLOCK_P, BLOCK_P, p, x_p)
    dy_columns, _ = offsets(head, dy_h, block * BLOCK_P, BLOCK_P, p, dy_p)
    out_columns, _ = offsets(head, p, block * BLOCK_P, BLOCK_P, p, 1)
    out_t = heads * p
    out_b = length.to(tl.int64) * out_t
    B_columns, real = offsets(group, B_g, 0, BLOCK_N, n, B_n)
    C_columns, _ = offsets(group, C_g, 0, BLOCK_N, n, C_n)
    i = tl.arange(0, CHUNK)
    inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    at = (batch * heads + head) * (chunks * CHUNK)
    at_dsteps = ((batch * heads + head) * BLOCKS + block) * (chunks * CHUNK)
    begin = (first + s) * per_segment
    count = tl.minimum(per_segment, chunks - begin)
    dtype = tl.float32 if EXACT else x.dtype.element_ty
    sums = (batch * segments + s) * heads + head
    R = load_state(adjoint + sums * (n * p), n, p, block, BLOCK_N, BLOCK_P)
    a = tl.load(A + head.to(tl.int64) * A_h).to(tl.float32)
    decay_sum = tl.zeros([CHUNK], tl.float32)
    if D is not None:
        skip_columns, _ = offsets(head, D_h, block * BLOCK_P, BLOCK_P, p, D_p)
        skip_sum = tl.zeros([BLOCK_P if CHANNELS else CHUNK], tl.float32)
    if z is not None:
        z_columns, _ = offsets(head, z_h, block * BLOCK_P, BLOCK_P, p, z_p)
    for k in range(count):
        c = count - 1 - k
        t = (begin + c) * CHUNK
        at_kept = chunk_state(
            0, batch, s * per_segment + c, segments * per_segment, head, heads, block, BLOCKS, BLOCK_N * BLOCK_P
        )
        key = load_tokens(B, batch, t, length, direction, B_b, B_t, B_columns, real, CHUNK).to(dtype)
        query = load_tokens(C, batch, t, length, direction, C_b, C_t, C_columns, real, CHUNK).to(dtype)
        value = load_tokens(x, batch, t, length, direction, x_b, x_t, columns, inside, CHUNK)
        dout = load_tokens(dy, batch, t, length, direction, dy_b, dy_t, dy_columns, inside, CHUNK)
        S = tl.load(entering + at_kept + inner)
        step = tl.load(steps + at + t + i)
        from_start, to_end, through = chunk_decays(logs, resets, at + t, CHUNK)
        through = tl.exp2(through)

        # The order keeps few matrices alive at a time. Through the state that enters:
        across = tl.sum(tl.sum(S.to(tl.float32) * R, axis=1), axis=0) * through
        carried = tl.dot(query, S.to(dtype), input_precision="ieee") * from_start[:, None]
        matrix = tl.dot(key, tl.trans(query), input_precision="ieee")  # (j, i), as everything below
        matrix *= decay_matrix(logs, resets, at + t, True, CHUNK)
        if z is not None:
            gate = load_tokens(z, batch, t, length, direction, z_b, z_t, z_columns, inside, CHUNK).to(tl.float32)
            read = tl.trans((matrix * step[:, None]).to(dtype))
            out = tl.dot(read, value.to(dtype), acc=carried, input_precision="ieee")
            if D is not None:
                skip = tl.load(D + skip_columns, mask=inside, other=0.0)
                out += value.to(tl.float32) * skip.to(tl.float32)[None, :]
            share = sigmoid(gate)
            dgate = dout.to(tl.float32) * out * (share * (1.0 + gate * (1.0 - share)))
            store_tokens(dz, batch, t, length, direction, out_b, out_t, out_columns, inside, dgate, CHUNK)
            dscan = dout.to(tl.float32) * (gate * share)
        else:
            dscan = dout.to(tl.float32)
        dout = dscan.to(dtype)
        flow_in = tl.sum(carried * dscan, axis=1)
        if D is not None:
            skip_sum += tl.sum(dscan * value.to(tl.float32), axis=0 if CHANNELS else 1)

        # Through the chunk's own matrix. The log decay of token k takes all that flows from before k to k or beyond:
        # with the diagonal left out, what tokens from k on receive less what they give.
        dmatrix = tl.dot(value.to(dtype), tl.trans(dout), input_precision="ieee")
        flow = tl.where(i[:, None] < i[None, :], dmatrix * matrix * step[:, None], 0.0)
        balance = flow_in - tl.sum(flow, axis=1) + tl.sum(flow, axis=0)

        # Through the state that leaves.
        later = tl.dot(key, R.to(dtype), input_precision="ieee") * to_end[:, None]
        flow_out = tl.sum(later * value.to(tl.float32), axis=1) * step
        ddrive = tl.dot(matrix.to(dtype), dout, acc=later, input_precision="ieee")
        dlog = tl.cumsum(balance, axis=0, reverse=True) + (tl.cumsum(flow_out, axis=0) - flow_out) + across
        dstep = tl.sum(ddrive * value.to(tl.float32), axis=1) + a * dlog
        decay_sum += step * dlog
        tl.store(dsteps + at_dsteps + t + i, dstep)
        dvalue = ddrive * step[:, None]
        if D is not None:
            skip = tl.load(D + skip_columns, mask=inside, other=0.0)
            dvalue += dout.to(tl.float32) * skip.to(tl.float32)[None, :]
        store_tokens(dx, batch, t, length, direction, out_b, out_t, out_columns, inside, dvalue, CHUNK)

        tl.store(leaving + at_kept + inner, R.to(leaving.dtype.element_ty))
        drive = (dout.to(tl.float32) * from_start[:, None]).to(dtype)
        R = tl.dot(tl.trans(query), drive, acc=R * through, input_precision="ieee")
    if first + s == 0:
        store_state(dinitial + (batch * heads + head) * (n * p), n, p, block, R, BLOCK_N, BLOCK_P)
    tl.store(dA + sums * BLOCKS + block, tl.sum(decay_sum, axis=0))
    if D is not None and CHANNELS:
        tl.store(dD + (sums * BLOCKS + block) * BLOCK_P + tl.arange(0, BLOCK_P), skip_sum)
    elif D is not None:
        tl.store(dD + sums * BLOCKS + block, tl.sum(skip_sum, axis=0))


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


@triton.jit(do_not_specialize=["length", "padded_length", "reverse_mask"])
def finish_kernel(
    dsteps, dt, bias, ddt, dt_b, dt_t, dt_h, bias_h, length, padded_length, heads, per_group, reverse_mask,
    SOFTPLUS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ddt (b, l, h) float32 from the gradient of the step sizes ``dsteps`` (b, h, blocks, t)."""
    blocks = tl.cdiv(heads, BLOCK)
    parts = tl.cdiv(length, BLOCK_T)
    pid = tl.program_id(0)
    h = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    t = (pid // blocks) % parts * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = (pid // (blocks * parts)).to(tl.int64)
    mask = (t < length)[:, None] & (h < heads)[None, :]
    backwards = ((reverse_mask >> (h // per_group)) & 1) != 0
    token = tl.where(backwards[None, :], length - 1 - t[:, None], t[:, None]).to(tl.int64)
    gradient = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for block in tl.static_range(BLOCKS):
        at = ((batch * heads + h) * BLOCKS + block)[None, :] * padded_length.to(tl.int64) + t[:, None]
        gradient += tl.load(dsteps + at, mask=mask, other=0.0)
    if SOFTPLUS:
        raw = tl.load(dt + batch * dt_b + token * dt_t + h[None, :] * dt_h, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            raw += tl.load(bias + h * bias_h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
        gradient *= sigmoid(raw)
    tl.store(ddt + (batch * length + token) * heads + h[None, :], gradient, mask=mask)
