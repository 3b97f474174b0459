import copy
import math

import pytest
import torch
from torch import Tensor

from seqssm.errors import UserError
from seqssm.mixers import S4D, Attention, Mamba, Mamba2, Mixer

D = 16
MIXERS = {
    "mamba": lambda: Mamba(D, d_state=5),
    "mamba2": lambda: Mamba2(D, d_state=6, headdim=8),
    "mamba2-groups": lambda: Mamba2(D, d_state=4, headdim=4, ngroups=2, d_conv=3),
    "s4d": lambda: S4D(D, d_state=6),
    "attention": lambda: Attention(D, heads=2),
    "attention-grouped": lambda: Attention(D, heads=4, kv_heads=2, bias=True),
    "attention-window": lambda: Attention(D, heads=4, kv_heads=2, window=5),
}


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> Mixer:
    torch.manual_seed(0)
    return MIXERS[request.param]().double()


def inputs(batch: int = 2, length: int = 23) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_chunks(mixer: Mixer, x: Tensor, sizes: list[int], seq_idx: Tensor | None = None) -> tuple[Tensor, dict]:
    outputs, state, begin = [], None, 0
    for size in sizes:
        part = slice(begin, begin + size)
        y, state = mixer(x[:, part], state, seq_idx=None if seq_idx is None else seq_idx[:, part])
        outputs.append(y)
        begin += size
    assert begin == x.shape[1]
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("sizes", [[1] * 23, [3, 1, 7, 12], [22, 1], [1, 22]])
@torch.no_grad()
def test_chunks_equal_one_pass(mixer, sizes):
    x = inputs()
    y, state = mixer(x)
    chunked, last = in_chunks(mixer, x, sizes)
    torch.testing.assert_close(chunked, y, rtol=1e-10, atol=1e-12)
    for key in mixer.state_keys:
        torch.testing.assert_close(last[key], state[key], rtol=1e-10, atol=1e-12)


def test_chunks_equal_one_pass_float32(mixer):
    mixer, x = mixer.float(), inputs().float()
    torch.testing.assert_close(in_chunks(mixer, x, [5, 1, 9, 8])[0], mixer(x)[0], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_state(mixer):
    x, weight = inputs().requires_grad_(), inputs()
    parameters = [*mixer.parameters(), x]
    whole = torch.autograd.grad((mixer(x)[0] * weight).sum(), parameters)
    chunked = torch.autograd.grad((in_chunks(mixer, x, [4, 1, 10, 8])[0] * weight).sum(), parameters)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_steps_equal_one_pass_and_write_in_place(mixer):
    x = inputs()
    state = mixer.init_state(2)
    fixed = {key: value.data_ptr() for key, value in state.items()} if getattr(mixer, "window", 1) else {}
    y = torch.stack([mixer.step(x[:, i], state) for i in range(x.shape[1])], 1)
    torch.testing.assert_close(y, mixer(x)[0], rtol=1e-10, atol=1e-12)
    assert fixed == {key: state[key].data_ptr() for key in fixed}


@pytest.mark.parametrize("length", [1, 6])
@torch.no_grad()
def test_forward_leaves_its_state_alone(mixer, length):
    _, state = mixer(inputs())
    before = {key: value.clone() for key, value in state.items()}
    mixer(inputs(length=length), state)
    for key, value in before.items():
        assert torch.equal(state[key], value)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_reverse_equals_flips(mixer, packed):
    x = inputs()
    seq_idx = torch.tensor([[0] * 9 + [4] * 14, [1] * 23]) if packed else None
    y, state = mixer(x, seq_idx=seq_idx, reverse=True)
    flipped, expected = mixer(x.flip(1), seq_idx=None if seq_idx is None else seq_idx.flip(1))
    torch.testing.assert_close(y, flipped.flip(1), rtol=1e-10, atol=1e-12)
    for key in mixer.state_keys:
        torch.testing.assert_close(state[key], expected[key], rtol=1e-10, atol=1e-12)
    again, _ = mixer(inputs(length=3), state, reverse=True)
    torch.testing.assert_close(again, mixer(inputs(length=3).flip(1), expected)[0].flip(1), rtol=1e-10, atol=1e-12)


def test_packed_sequences_equal_separate_ones(mixer):
    x = inputs()
    seq_idx = torch.tensor([[7] * 6 + [3] * 1 + [7] * 16, [0] * 20 + [1] * 3])
    for causal in (True,) if mixer.recurrent else (True, False):
        mixer.causal = causal
        y, state = mixer(x, seq_idx=seq_idx)
        for row, begin, end in [(0, 0, 6), (0, 6, 7), (0, 7, 23), (1, 0, 20), (1, 20, 23)]:
            alone, last = mixer(x[row : row + 1, begin:end])
            torch.testing.assert_close(y[row : row + 1, begin:end], alone, rtol=1e-10, atol=1e-12)
            if end == 23 and causal:
                # What follows in a row continues its last segment.
                follow = inputs(length=4)[row : row + 1]
                one = {key: value[row : row + 1] for key, value in state.items()}
                torch.testing.assert_close(mixer(follow, one)[0], mixer(follow, last)[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_packed_sequences_in_chunks_equal_one_pass(mixer):
    x = inputs()
    seq_idx = torch.tensor([[7] * 6 + [3] * 1 + [7] * 16, [0] * 20 + [1] * 3])
    y, _ = mixer(x, seq_idx=seq_idx)
    # The first token of a chunk continues the chunk before, so a chunk must not begin at a change: at 6, 7 or 20.
    for sizes in ([5, 6, 12], [9, 13, 1], [1, 2, 5, 1, 1, 13], [23]):
        torch.testing.assert_close(in_chunks(mixer, x, sizes, seq_idx)[0], y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(mixer, reverse):
    x = inputs(batch=3)
    lengths = [23, 9, 1]
    seq_idx = (torch.arange(23) >= torch.tensor(lengths)[:, None]).int()
    x[1, 9:], x[2, 1:] = 10.0, -10.0
    y, _ = mixer(x, seq_idx=seq_idx, reverse=reverse)
    for row, length in enumerate(lengths):
        alone, _ = mixer(x[row : row + 1, :length], reverse=reverse)
        torch.testing.assert_close(y[row : row + 1, :length], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_sensitive_parameters_and_states_stay_float32(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]().to(torch.bfloat16)
    assert mixer.out_proj.weight.dtype == torch.bfloat16
    for parameter in mixer.float32_parameters:
        assert mixer.get_parameter(parameter).dtype == torch.float32
    y, state = mixer(inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in mixer.parameters())
    mixer.to(torch.float16)  # gradients travel along
    assert all(p.grad.dtype == p.dtype for p in mixer.parameters())

    full = MIXERS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        y, autocast_state = full(inputs().float())
        y, autocast_state = full(inputs().float(), autocast_state)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in full.parameters())
    for states in (state, autocast_state, mixer.init_state(2), full.init_state(2, dtype=torch.bfloat16)):
        if "scan" in states:
            assert states["scan"].dtype == torch.float32


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_is_near_float32(name):
    torch.manual_seed(0)
    mixer, x = MIXERS[name](), inputs().float()
    y, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half, state = mixer(x[:, :11])
        rest, _ = mixer(x[:, 11:], state)
    error = (torch.cat([half, rest], 1).float() - y).abs().max()
    assert error < 0.05 * y.abs().max()


def test_published_initialisation():
    torch.manual_seed(0)
    mamba = Mamba(64, d_state=16)
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(mamba.D, torch.ones(128))
    dt = torch.nn.functional.softplus(mamba.dt_proj.bias)
    mamba2 = Mamba2(256, headdim=1)
    dt2 = torch.nn.functional.softplus(mamba2.dt_bias)
    for steps in (dt, dt2):
        assert 0.99e-3 < steps.min() < 2e-3
        assert 0.05 < steps.max() < 0.101
        assert abs(steps.log().mean() - math.log(1e-2)) < 0.3  # log-uniform: the middle is the geometric mean
    rank = mamba.dt_rank
    assert rank == 4
    assert mamba.dt_proj.weight.abs().max() <= rank**-0.5
    assert mamba2.A_log.exp().min() >= 1
    assert 12 < mamba2.A_log.exp().max() <= 16
    s4d = S4D(8, d_state=6)
    torch.testing.assert_close(-s4d.A_log.exp(), torch.full((16, 3), -0.5))
    torch.testing.assert_close(s4d.A_imag[3], torch.tensor([0.0, math.pi, 2 * math.pi]))


@torch.no_grad()
def test_s4d_is_its_recurrence():
    torch.manual_seed(0)
    mixer, x = S4D(D, d_state=6).double(), inputs(length=300)
    dt = mixer.log_dt.exp()[:, None]
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imag)
    C = torch.view_as_complex(mixer.C)
    u, z = mixer.in_proj(x).chunk(2, -1)
    h = torch.zeros(2, 2 * D, 3, dtype=torch.complex128)
    y = []
    for t in range(300):
        h = torch.exp(dt * A) * h + (torch.exp(dt * A) - 1) / A * u[:, t, :, None]
        y.append(2 * (C * h).sum(-1).real + mixer.D * u[:, t])
    expected = mixer.out_proj(torch.stack(y, 1) * torch.nn.functional.silu(z))
    actual, state = mixer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.view_as_complex(state["scan"]), h, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_attention_is_softmax_of_rotated_products(window, causal):
    torch.manual_seed(0)
    mixer, x = Attention(D, heads=4, kv_heads=2, window=window, rope_theta=100.0).double(), inputs(length=29)
    mixer.causal = causal
    q, k, v = mixer.in_proj(x).split([16, 8, 8], -1)

    def rotate(vectors: Tensor) -> Tensor:  # as complex numbers: channels i and i + p/2 are a pair
        angle = torch.arange(29)[:, None, None] * 100.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
        a, b = vectors.unflatten(-1, (-1, 4)).chunk(2, -1)
        return torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)

    i, j = torch.arange(29)[:, None], torch.arange(29)
    hidden = torch.zeros(29, 29, dtype=torch.bool)
    if causal:
        hidden = (j > i) | (j <= i - (window or 99))
    heads = []
    for head in range(4):
        scores = (rotate(q)[:, :, None, head] * rotate(k)[:, None, :, head // 2].conj()).real.sum(-1) / 2
        probability = scores.masked_fill(hidden, -math.inf).softmax(-1)
        heads.append(probability @ v.unflatten(-1, (2, 4))[:, :, head // 2])
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(torch.cat(heads, -1)), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_attention_with_a_window_keeps_its_memory():
    mixer = Attention(D, window=5)
    state = mixer.init_state(1)
    for _ in range(4):
        _, state = mixer(torch.randn(1, 9, D), state)
        assert state["key"].shape == state["value"].shape == (1, 5, 4, 4)
    assert state["length"].item() == 5


def test_copies_are_independent(mixer):
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.allclose(twin(inputs())[0], mixer(inputs())[0])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Mamba2(16, headdim=5), "headdim"),
        (lambda: S4D(16, d_state=3), "even"),
        (lambda: Attention(16, heads=3), "heads"),
        (lambda: Attention(16, window=0), "window"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, word):
    with pytest.raises(UserError, match=word):
        make()
