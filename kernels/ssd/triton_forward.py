# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the forward SSD scan, and the parts that the backward pass shares; README.md has the plan.

Names follow README.md. Everything is in scan time t: chunk c holds the tokens from c * CHUNK on, and a group that runs
backwards only changes where a token lies in memory. States are transposed, (n, p), and padded to BLOCK_N by BLOCK_P;
what is padded stays zero. ``steps`` and ``logs`` (b, h, t) are the step sizes and the running sums of the log2 decays
within each chunk, ``resets`` (b, h, t) the running count of resets there; t runs to the end of the last chunk.
"""

import os

import triton
import triton.language as tl

from seqssm.kernels.triton_tiles import LOG2E, rows, sigmoid, softplus

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def locate(pid, heads, segments, BLOCKS: tl.constexpr):
    """Batch row, segment, head and block of channels of program ``pid``. Heads next to each other share B and C."""
    block = pid % BLOCKS
    head = (pid // BLOCKS) % heads
    segment = (pid // (BLOCKS * heads)) % segments
    return (pid // (BLOCKS * heads * segments)).to(tl.int64), segment, head, block


@triton.jit
def offsets(index, stride_index, start, SIZE: tl.constexpr, limit, stride):
    """Offsets of SIZE columns from ``start`` in row ``index`` of a matrix, and which lie below ``limit``."""
    columns = start + tl.arange(0, SIZE)
    return index.to(tl.int64) * stride_index + columns.to(tl.int64) * stride, columns < limit


@triton.jit
def token_numbers(t, CHUNK: tl.constexpr):
    """0 to CHUNK - 1, which the compiler takes to depend on ``t``: else it would compute the addresses of all rows
    before the loop over chunks, and hold them in registers."""
    i = tl.arange(0, CHUNK)
    if not INTERPRET:
        i = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [i, t], tl.int32, True, 1)
    return i


@triton.jit
def load_tokens(pointer, batch, t, length, direction, stride_b, stride_t, columns, mask, CHUNK: tl.constexpr):
    """The matrix (CHUNK, columns) of the tokens from scan time ``t``, zeros past the end."""
    row, step = rows(pointer, batch, t, length, direction, stride_b, stride_t)
    i = token_numbers(t, CHUNK)
    at = row + i.to(tl.int64)[:, None] * step + columns[None, :]
    return tl.load(at, mask=(t + i < length)[:, None] & mask[None, :], other=0.0)


@triton.jit
def store_tokens(pointer, batch, t, length, direction, stride_b, stride_t, columns, mask, x, CHUNK: tl.constexpr):
    """Write what ``load_tokens`` would read."""
    row, step = rows(pointer, batch, t, length, direction, stride_b, stride_t)
    i = token_numbers(t, CHUNK)
    at = row + i.to(tl.int64)[:, None] * step + columns[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(t + i < length)[:, None] & mask[None, :])


@triton.jit
def state_offsets(n, p, block, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets of one block of a state (n, p) with any strides, and which lie inside."""
    i = tl.arange(0, BLOCK_N)
    j = block * BLOCK_P + tl.arange(0, BLOCK_P)
    at = i.to(tl.int64)[:, None] * stride_n + j.to(tl.int64)[None, :] * stride_p
    return at, (i < n)[:, None] & (j < p)[None, :]


@triton.jit
def load_state(pointer, n, p, block, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """One block of a state (n, p), zeros where it is padded; zeros for no pointer at all."""
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if pointer is not None:
        at, mask = state_offsets(n, p, block, stride_n, stride_p, BLOCK_N, BLOCK_P)
        state = tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
    return state


@triton.jit
def store_state(pointer, n, p, block, stride_n, stride_p, state, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Write one block of a state (n, p)."""
    at, mask = state_offsets(n, p, block, stride_n, stride_p, BLOCK_N, BLOCK_P)
    tl.store(pointer + at, state.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def chunk_state(pointer, batch, chunk, chunks, head, heads, block, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Pointer to the block of one chunk's state in (b, chunks, h, blocks, SIZE)."""
    return pointer + (((batch * chunks + chunk) * heads + head) * BLOCKS + block) * SIZE


@triton.jit
def chunk_decays(logs, resets, at, CHUNK: tl.constexpr):
    """Of the chunk whose numbers begin at ``at``: the decay from where the scan enters it to each token, from each
    token to where the scan leaves, and the log2 decay across, -inf where a reset cuts the past off."""
    i = tl.arange(0, CHUNK)
    log = tl.load(logs + at + i)
    total = tl.load(logs + at + CHUNK - 1)
    from_start = tl.exp2(log.to(tl.float32))
    to_end = tl.exp2((total - log).to(tl.float32))
    through = total.to(tl.float32)
    if resets is not None:
        count = tl.load(resets + at + i)
        last = tl.load(resets + at + CHUNK - 1)
        from_start = tl.where(count == 0, from_start, 0.0)
        to_end = tl.where(count == last, to_end, 0.0)
        through = tl.where(last == 0, through, float("-inf"))
    return from_start, to_end, through


@triton.jit
def decay_matrix(logs, resets, at, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr):
    """Decay from token j to token i of a chunk, (i, j) or TRANSPOSED (j, i); zero where i does not see j."""
    i = tl.arange(0, CHUNK)
    log = tl.load(logs + at + i)
    if TRANSPOSED:
        exponent = (log[None, :] - log[:, None]).to(tl.float32)
        sees = i[None, :] >= i[:, None]
    else:
        exponent = (log[:, None] - log[None, :]).to(tl.float32)
        sees = i[:, None] >= i[None, :]
    if resets is not None:
        count = tl.load(resets + at + i)
        sees = sees & (count[:, None] == count[None, :])
    # Masked before: what is not seen may have a large positive exponent.
    return tl.exp2(tl.where(sees, exponent, float("-inf")))


@triton.jit(do_not_specialize=["length", "padded_length", "reverse_mask"])
def prepare_kernel(
    dt, A, bias, seq_idx, steps, logs, resets,
    dt_b, dt_t, dt_h, A_h, bias_h, seq_b, seq_t, length, padded_length, heads, per_group, reverse_mask,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step sizes, log decays summed within the chunk and counts of resets, each (b, h, t), from dt (b, l, h)."""
    blocks = tl.cdiv(heads, BLOCK)
    chunks = padded_length // CHUNK
    pid = tl.program_id(0)
    h = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    t = (pid // blocks) % chunks * CHUNK + tl.arange(0, CHUNK)
    batch = (pid // (blocks * chunks)).to(tl.int64)
    mask = (t < length)[:, None] & (h < heads)[None, :]
    backwards = ((reverse_mask >> (h // per_group)) & 1) != 0
    token = tl.where(backwards[None, :], length - 1 - t[:, None], t[:, None]).to(tl.int64)
    far = h.to(tl.int64) * dt_h  # dt may be a head-major view of a long sequence
    step = tl.load(dt + batch * dt_b + token * dt_t + far[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + h * bias_h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(mask, step, 0.0)  # a step of zero leaves the state as it is
    a = tl.load(A + h * A_h, mask=h < heads, other=0.0).to(logs.dtype.element_ty) * LOG2E
    log = tl.cumsum(step.to(logs.dtype.element_ty) * a[None, :], axis=0)
    out = (batch * heads + h)[None, :] * padded_length.to(tl.int64) + t[:, None]
    written = (h < heads)[None, :] & (t < padded_length)[:, None]
    tl.store(steps + out, step, mask=written)
    tl.store(logs + out, log, mask=written)
    if seq_idx is not None:
        before = token + tl.where(backwards, 1, -1)[None, :]
        follows = mask & (t > 0)[:, None]
        current = tl.load(seq_idx + batch * seq_b + token * seq_t, mask=follows, other=0)
        previous = tl.load(seq_idx + batch * seq_b + before * seq_t, mask=follows, other=0)
        tl.store(resets + out, tl.cumsum((current != previous).to(tl.int32), axis=0), mask=written)


@triton.jit
def walk_segment(
    values, gate, keys, steps, logs, resets, state, kept, batch, head, block, begin, count, first_kept, kept_chunks,
    values_b, values_t, values_h, values_p, gate_b, gate_t, gate_h, gate_p, keys_b, keys_t, keys_g, keys_n,
    length, chunks, heads, per_group, p, n, reverse_mask,
    ADJOINT: tl.constexpr, KEEP: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Walk ``state`` through ``count`` chunks from number ``begin`` on; returns it and the log2 decay of all of them.

    From x and B, or with ADJOINT, last chunk to first, from dy (times silu of ``gate``) and C. With KEEP the state that
    enters each chunk (leaves it, with ADJOINT) goes to ``kept`` (b, chunks, h, blocks, BLOCK_N, BLOCK_P).
    """
    group = head // per_group
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    columns, inside = offsets(head, values_h, block * BLOCK_P, BLOCK_P, p, values_p)
    if gate is not None:
        gate_columns, _ = offsets(head, gate_h, block * BLOCK_P, BLOCK_P, p, gate_p)
    states, real = offsets(group, keys_g, 0, BLOCK_N, n, keys_n)
    at = (batch * heads + head) * (chunks * CHUNK)
    dtype = tl.float32 if EXACT else values.dtype.element_ty
    total = tl.full((), 0.0, tl.float32)
    for i in range(count):
        c = count - 1 - i if ADJOINT else i
        t = (begin + c) * CHUNK
        if KEEP:
            at_kept = chunk_state(
                kept, batch, first_kept + c, kept_chunks, head, heads, block, BLOCKS, BLOCK_N * BLOCK_P
            )
            inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
            tl.store(at_kept + inner, state.to(kept.dtype.element_ty))
        x = load_tokens(values, batch, t, length, direction, values_b, values_t, columns, inside, CHUNK).to(tl.float32)
        key = load_tokens(keys, batch, t, length, direction, keys_b, keys_t, states, real, CHUNK).to(dtype)
        from_start, to_end, through = chunk_decays(logs, resets, at + t, CHUNK)
        if ADJOINT:
            weight = from_start
            if gate is not None:
                z = load_tokens(gate, batch, t, length, direction, gate_b, gate_t, gate_columns, inside, CHUNK)
                z = z.to(tl.float32)
                x *= z * sigmoid(z)
        else:
            weight = to_end * tl.load(steps + at + t + tl.arange(0, CHUNK))
        drive = (x * weight[:, None]).to(dtype)
        state = tl.dot(tl.trans(key), drive, acc=state * tl.exp2(through), input_precision="ieee")
        total += through
    return state, total


@triton.jit(
    do_not_specialize=["length", "chunks", "first", "segments", "per_segment", "carry_b", "totals_b", "reverse_mask"]
)
def walk_kernel(
    values, gate, keys, steps, logs, resets, carry, totals,
    values_b, values_t, values_h, values_p, gate_b, gate_t, gate_h, gate_p, keys_b, keys_t, keys_g, keys_n,
    carry_b, totals_b,
    length, chunks, first, segments, per_segment, heads, per_group, p, n, reverse_mask,
    ADJOINT: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """What one segment of ``per_segment`` chunks makes from zero: its end state (its first adjoint) in ``carry``
    (b, segments, h, n, p) and its log2 decay in ``totals`` (b, segments, h); ``first`` segments come before.
    """
    batch, s, head, block = locate(tl.program_id(0), heads, segments, BLOCKS)
    begin = (first + s) * per_segment
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    state, total = walk_segment(
        values, gate, keys, steps, logs, resets, state, None, batch, head, block,
        begin, tl.minimum(per_segment, chunks - begin), 0, 0,
        values_b, values_t, values_h, values_p, gate_b, gate_t, gate_h, gate_p, keys_b, keys_t, keys_g, keys_n,
        length, chunks, heads, per_group, p, n, reverse_mask,
        ADJOINT, False, EXACT, CHUNK, BLOCK_N, BLOCK_P, BLOCKS,
    )  # fmt: skip
    carry += batch * carry_b + (s * heads + head).to(tl.int64) * (n * p)
    store_state(carry, n, p, block, p, 1, state, BLOCK_N, BLOCK_P)
    tl.store(totals + batch * totals_b + s * heads + head, total)


@triton.jit(do_not_specialize=["segments"])
def pass_kernel(
    carry, totals, entering, entering_b, entering_h, entering_n, entering_p, segments, heads, p, size,
    BACKWARD: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn ``carry`` (b, segments, h, n, p) in place from what each segment makes by itself into what enters it.

    ``entering`` is what enters the first segment, None for zero; ``size`` is n * p. BACKWARD goes from the last segment
    to the first. Memory is read UNROLL segments ahead of the recurrence.
    """
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    lane = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < size
    head = (pid // blocks) % heads
    batch = (pid // (blocks * heads)).to(tl.int64)
    h = tl.zeros([BLOCK], tl.float32)
    if entering is not None:
        at = (lane // p).to(tl.int64) * entering_n + (lane % p).to(tl.int64) * entering_p
        at += batch * entering_b + head.to(tl.int64) * entering_h
        h = tl.load(entering + at, mask=mask, other=0.0).to(tl.float32)
    carry += (batch * segments * heads + head) * size + lane
    totals += batch * segments * heads + head
    size_step, total_step = tl.cast(heads * size, tl.int64), heads
    if BACKWARD:
        carry += (segments - 1) * size_step
        totals += (segments - 1) * heads
        size_step, total_step = -size_step, -total_step
    for s in range(0, segments, UNROLL):
        ends = ()
        decays = ()
        for j in tl.static_range(UNROLL):
            ends += (tl.load(carry + j * size_step, mask=mask & (s + j < segments), other=0.0),)
            decays += (tl.exp2(tl.load(totals + j * total_step, mask=s + j < segments, other=0.0)),)
        for j in tl.static_range(UNROLL):
            tl.store(carry + j * size_step, h, mask=mask & (s + j < segments))
            h = h * decays[j] + ends[j]
        carry += UNROLL * size_step
        totals += UNROLL * total_step


@triton.jit(do_not_specialize=["length", "chunks", "segments", "per_segment", "reverse_mask"])
def output_kernel(
    x, B, C, D, z, steps, logs, resets, carry, y, final_state,
    x_b, x_t, x_h, x_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, D_h, D_p, z_b, z_t, z_h, z_p,
    carry_b, carry_s, carry_h, carry_n, carry_p,
    length, chunks, segments, per_segment, heads, per_group, p, n, reverse_mask,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y (b, l, h, p) of one segment, from the state in ``carry``, zero when None; the last segment writes
    ``final_state`` (b, h, p, n)."""
    batch, s, head, block = locate(tl.program_id(0), heads, segments, BLOCKS)
    group = head // per_group
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    columns, inside = offsets(head, x_h, block * BLOCK_P, BLOCK_P, p, x_p)
    y_columns, _ = offsets(head, p, block * BLOCK_P, BLOCK_P, p, 1)
    if z is not None:
        z_columns, _ = offsets(head, z_h, block * BLOCK_P, BLOCK_P, p, z_p)
    B_columns, real = offsets(group, B_g, 0, BLOCK_N, n, B_n)
    C_columns, _ = offsets(group, C_g, 0, BLOCK_N, n, C_n)
    at = (batch * heads + head) * (chunks * CHUNK)
    begin = s * per_segment
    count = tl.minimum(per_segment, chunks - begin)
    dtype = tl.float32 if EXACT else x.dtype.element_ty
    if carry is not None:
        carry += batch * carry_b + s.to(tl.int64) * carry_s + head.to(tl.int64) * carry_h
    state = load_state(carry, n, p, block, carry_n, carry_p, BLOCK_N, BLOCK_P)
    if D is not None:
        skip_columns, _ = offsets(head, D_h, block * BLOCK_P, BLOCK_P, p, D_p)
    y_t = heads * p
    for c in range(count):
        t = (begin + c) * CHUNK
        key = load_tokens(B, batch, t, length, direction, B_b, B_t, B_columns, real, CHUNK).to(dtype)
        query = load_tokens(C, batch, t, length, direction, C_b, C_t, C_columns, real, CHUNK).to(dtype)
        value = load_tokens(x, batch, t, length, direction, x_b, x_t, columns, inside, CHUNK)
        step = tl.load(steps + at + t + tl.arange(0, CHUNK))
        from_start, to_end, through = chunk_decays(logs, resets, at + t, CHUNK)
        matrix = tl.dot(query, tl.trans(key), input_precision="ieee")
        out = tl.dot(query, state.to(dtype), input_precision="ieee") * from_start[:, None]
        matrix *= decay_matrix(logs, resets, at + t, False, CHUNK) * step[None, :]
        out = tl.dot(matrix.to(dtype), value.to(dtype), acc=out, input_precision="ieee")
        drive = (value.to(tl.float32) * (step * to_end)[:, None]).to(dtype)
        state = tl.dot(tl.trans(key), drive, acc=state * tl.exp2(through), input_precision="ieee")
        if D is not None:
            skip = tl.load(D + skip_columns, mask=inside, other=0.0)
            out += value.to(tl.float32) * skip.to(tl.float32)[None, :]
        if z is not None:
            gate = load_tokens(z, batch, t, length, direction, z_b, z_t, z_columns, inside, CHUNK).to(tl.float32)
            out *= gate * sigmoid(gate)
        store_tokens(y, batch, t, length, direction, length.to(tl.int64) * y_t, y_t, y_columns, inside, out, CHUNK)
    if s == segments - 1:
        store_state(final_state + (batch * heads + head) * (n * p), n, p, block, 1, n, state, BLOCK_N, BLOCK_P)


@triton.jit
def step_kernel(
    state, x, dt, A, B, C, D, z, bias, y,
    state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, A_h, B_b, B_g, B_n, C_b, C_g, C_n,
    D_h, D_p, z_b, z_h, z_p, bias_h,
    heads, per_group, p, n,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token: the state (b, h, p, n) in place, y (b, h, p)."""
    blocks = tl.cdiv(p, BLOCK_P)
    pid = tl.program_id(0)
    # In 64 bits, as k and head: a token of a channel-major view of a long sequence has far strides.
    j = (pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    head = ((pid // blocks) % heads).to(tl.int64)
    batch = (pid // (blocks * heads)).to(tl.int64)
    group = head // per_group
    inside = j < p
    step = tl.load(dt + batch * dt_b + head * dt_h).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + head * bias_h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    decay = tl.exp2(step * (tl.load(A + head * A_h).to(tl.float32) * LOG2E))
    value = tl.load(x + batch * x_b + head * x_h + j * x_p, mask=inside, other=0.0).to(tl.float32)
    k = tl.arange(0, BLOCK_N).to(tl.int64)
    real = k < n
    key = tl.load(B + batch * B_b + group * B_g + k * B_n, mask=real, other=0.0).to(tl.float32)
    query = tl.load(C + batch * C_b + group * C_g + k * C_n, mask=real, other=0.0).to(tl.float32)
    at = state + batch * state_b + head * state_h + j[:, None] * state_p + k[None, :] * state_n
    mask = inside[:, None] & real[None, :]
    h = tl.load(at, mask=mask, other=0.0) * decay + (step * value)[:, None] * key[None, :]
    tl.store(at, h, mask=mask)
    out = tl.sum(h * query[None, :], axis=1)
    if D is not None:
        out += value * tl.load(D + head * D_h + j * D_p, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + batch * z_b + head * z_h + j * z_p, mask=inside, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + (batch * heads + head) * p + j, out.to(y.dtype.element_ty), mask=inside)
