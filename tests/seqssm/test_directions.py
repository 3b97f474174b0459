import copy

import pytest
import torch
from torch import Tensor

from seqssm.directions import Bidirectional, ReverseComplement
from seqssm.errors import UserError
from seqssm.mixers import S4D, Attention, Mamba, Mamba2, Mixer

D = 16
MIXERS = {
    "mamba": lambda: Mamba(D, d_state=5),
    "mamba-bias": lambda: Mamba(D, d_state=3, bias=True, conv_bias=False),
    "mamba2": lambda: Mamba2(D, d_state=6, headdim=8),
    "mamba2-groups": lambda: Mamba2(D, d_state=4, headdim=4, ngroups=2, bias=True),
    "s4d": lambda: S4D(D, d_state=6),
}


def inputs(channels: int = D, batch: int = 2, length: int = 21) -> Tensor:
    return torch.randn(batch, length, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MIXERS)
def pair(request: pytest.FixtureRequest) -> tuple[Mixer, Mixer]:
    torch.manual_seed(0)
    return MIXERS[request.param]().double(), MIXERS[request.param]().double()


def two_way(pair: tuple[Mixer, Mixer], tied: bool) -> tuple[Bidirectional, Mixer, Mixer]:
    """A bidirectional layer, and two separate mixers with the same weights."""
    forward, backward = copy.deepcopy(pair)
    if tied:
        for name in backward.shared_modules:
            getattr(backward, name).load_state_dict(getattr(forward, name).state_dict())
    return Bidirectional(*copy.deepcopy(pair), tied=tied), forward, backward


def packed() -> Tensor:
    return torch.tensor([[0] * 8 + [1] * 13, [5] * 21])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_segments", [False, True])
def test_two_way_is_the_sum_of_two_readings(pair, tied, reverse, with_segments):
    layer, forward, backward = two_way(pair, tied)
    x = inputs().requires_grad_()
    seq_idx = packed() if with_segments else None
    if reverse:
        forward, backward = backward, forward
    flipped = None if seq_idx is None else seq_idx.flip(1)
    expected = forward(x, seq_idx=seq_idx)[0] + backward(x.flip(1), seq_idx=flipped)[0].flip(1)
    y, state = layer(x, seq_idx=seq_idx, reverse=reverse)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    assert state == {}
    weight = inputs(batch=2).flip(0)
    (actual,) = torch.autograd.grad((y * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-10)


def test_tied_directions_share_their_projections(pair):
    layer, forward, backward = two_way(pair, tied=True)
    names = set(layer.state_dict())
    assert "forward_mixer.in_proj.weight" in names
    assert not any(name.startswith(("backward_mixer.in_proj", "backward_mixer.out_proj")) for name in names)
    x = inputs()
    layer(x)[0].square().sum().backward()
    y = forward(x)[0] + backward(x, reverse=True)[0]
    y.square().sum().backward()
    shared = layer.forward_mixer.in_proj.weight.grad
    torch.testing.assert_close(shared, forward.in_proj.weight.grad + backward.in_proj.weight.grad)

    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.forward_mixer.in_proj.weight.zero_()
        twin.forward_mixer.out_proj.weight.fill_(1)
    assert twin.backward_mixer.in_proj is twin.forward_mixer.in_proj
    torch.testing.assert_close(layer(x)[0], y)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x)[0], y)
    assert layer.float().backward_mixer.in_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("directions", ["one", "tied", "untied"])
@pytest.mark.parametrize("with_segments", [False, True])
@torch.no_grad()
def test_swapping_the_strands_permutes_the_output(pair, directions, with_segments):
    inner = pair[0] if directions == "one" else Bidirectional(*pair, tied=directions == "tied")
    layer = ReverseComplement(inner)
    x = inputs(2 * D)
    seq_idx = packed() if with_segments else None
    y, _ = layer(x, seq_idx=seq_idx)

    def other_strand(x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2, -1)[::-1], -1).flip(1)

    swapped, _ = layer(other_strand(x), seq_idx=None if seq_idx is None else seq_idx.flip(1))
    torch.testing.assert_close(swapped, other_strand(y), rtol=1e-10, atol=1e-12)
    # The first strand is an ordinary layer on the first half.
    torch.testing.assert_close(y[..., :D], inner(x[..., :D], seq_idx=seq_idx)[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_attention_strands():
    torch.manual_seed(0)
    layer = ReverseComplement(Attention(D, heads=2).double())
    for causal in (True, False):
        layer.mixer.causal = causal
        x = inputs(2 * D)
        swapped = layer(torch.cat(x.chunk(2, -1)[::-1], -1).flip(1))[0]
        expected = torch.cat(layer(x)[0].chunk(2, -1)[::-1], -1).flip(1)
        torch.testing.assert_close(swapped, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strands", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(pair, strands, tied):
    layer: Mixer = Bidirectional(*pair, tied=tied)
    if strands == 2:
        layer = ReverseComplement(layer)
    x = inputs(strands * D, batch=3)
    lengths = [21, 8, 1]
    x[1, 8:], x[2, 1:] = 10.0, -10.0
    seq_idx = (torch.arange(21) >= torch.tensor(lengths)[:, None]).int()
    y, _ = layer(x, seq_idx=seq_idx)
    for row, length in enumerate(lengths):
        alone, _ = layer(x[row : row + 1, :length])
        torch.testing.assert_close(y[row : row + 1, :length], alone, rtol=1e-9, atol=1e-12)


def test_bfloat16_strands_and_directions(pair):
    layer = ReverseComplement(Bidirectional(*pair, tied=False)).float()
    x = inputs(2 * D).float()
    y = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)[0]
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).abs().max() < 0.05 * y.abs().max()
    layer.to(torch.bfloat16)(x.bfloat16())[0].float().sum().backward()
    assert layer.mixer.backward_mixer.D.grad.dtype == torch.float32


def test_no_state_is_carried(pair):
    for layer in (Bidirectional(*pair, tied=False), ReverseComplement(pair[0])):
        x = inputs(D * (2 if isinstance(layer, ReverseComplement) else 1))
        assert not layer.causal
        for ask in (
            lambda layer=layer, x=x: layer(x, {"scan": x}),
            lambda layer=layer: layer.init_state(1),
            lambda layer=layer, x=x: layer.step(x[:, 0], {}),
        ):
            with pytest.raises(UserError, match="both ways"):
                ask()
