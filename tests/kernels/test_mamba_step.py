"""One token, or a few, through a whole layer: the CPU's kernel, and Triton's in its interpreter and on a GPU."""

import pytest
import torch
from cases import distances
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor

from seqssm.kernels import LayerWeights, mamba_chunk, mamba_step


def layer(b: int, d: int, e: int, n: int, r: int, k: int, biases: bool) -> dict[str, Tensor]:
    """A layer's inputs in float64."""
    generator = torch.Generator().manual_seed(d + n)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": randn(b, d),
        "conv_state": randn(b, e, k - 1),
        "scan_state": randn(b, e, n),
        "norm_weight": randn(d),
        "in_proj": randn(2 * e, d) / d**0.5,
        "in_bias": randn(2 * e) if biases else None,
        "conv_weight": randn(e, k),
        "conv_bias": randn(e) if biases else None,
        "x_proj": randn(r + 2 * n, e) / e**0.5,
        "dt_proj": randn(e, r),
        "dt_bias": randn(e) - 2,
        "A_log": randn(e, n),
        "D": randn(e),
        "out_proj": randn(d, e) / e**0.5,
        "out_bias": randn(d) if biases else None,
    }


def split(given: dict[str, Tensor]) -> tuple:
    """The arguments of ``mamba_step``: the stream, both states, and the weights."""
    names = ("x", "conv_state", "scan_state")
    weights = {name: t for name, t in given.items() if name not in names}
    return *(given[name] for name in names), LayerWeights(**weights, eps=1e-5)


def check(sizes: tuple, dtype: torch.dtype, device: str, tolerance: float) -> None:
    wide = ("x", "scan_state", "dt_bias", "A_log", "D")
    given = {
        name: None if t is None else t.to(device, torch.float32 if name in wide else dtype)
        for name, t in layer(*sizes).items()
    }
    exact = {name: None if t is None else t.double() for name, t in given.items()}
    for _ in range(3):  # the states of one step are the next one's
        given["x"] = mamba_step(*split(given), backend="triton")
        exact["x"] = mamba_step(*split(exact), backend="reference")
    for name in ("x", "conv_state", "scan_state"):
        assert max(distances(given[name], exact[name].cpu())) <= tolerance


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("sizes", [(2, 8, 16, 4, 2, 4, True), (1, 5, 7, 3, 1, 1, False), (3, 12, 21, 5, 3, 2, True)])
def test_equals_the_formula(sizes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqssm.kernels.mamba_step import triton as backend

    monkeypatch.setattr(backend, "_SPAN", 4)  # several spans
    check(sizes, torch.float32, "cpu", 1e-5)


CHUNKS = [
    # b, d, e, n, r, k, biases, l
    (2, 8, 16, 4, 2, 4, True, 1),
    (3, 12, 21, 5, 3, 2, True, 7),
    (1, 5, 7, 3, 1, 1, False, 3),
    (2, 16, 24, 24, 9, 4, True, 2),
    (9, 192, 384, 16, 12, 4, False, 4),
    (2, 64, 128, 16, 4, 4, False, 16),
]


def chunk_inputs(*sizes: int) -> dict[str, Tensor]:
    """A layer's inputs for l tokens a row, in float64."""
    *layer_sizes, l = sizes
    given = layer(*layer_sizes)
    generator = torch.Generator().manual_seed(l)
    b, d = given["x"].shape
    given["x"] = torch.randn(b, l, d, generator=generator, dtype=torch.float64)
    return given


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", CHUNKS)
def test_a_chunk_is_as_near_to_the_formula_as_float32_is(sizes: tuple, packed: bool) -> None:
    exact = chunk_inputs(*sizes)
    b, l = exact["x"].shape[:2]
    seq_idx = torch.randint(2, (b, l), generator=torch.Generator().manual_seed(1)) if packed else None
    given = {name: None if t is None else t.float() for name, t in exact.items()}
    before = {name: None if t is None else t.clone() for name, t in given.items()}
    made = mamba_chunk(*split(given), seq_idx=seq_idx)
    plain = mamba_chunk(*split(given), seq_idx=seq_idx, backend="reference")
    right = mamba_chunk(*split(exact), seq_idx=seq_idx, backend="reference")
    assert all(t is None or torch.equal(t, before[name]) for name, t in given.items()), "an input was written to"
    for ours, float32, float64 in zip(made, plain, right, strict=True):
        assert ours.dtype == torch.float32
        if float64.numel():
            mine, theirs = max(distances(ours, float64)), max(distances(float32, float64))
            assert mine <= 2 * theirs + 1e-6, (mine, theirs)


@pytest.mark.parametrize("sizes", CHUNKS)
def test_a_row_of_a_chunk_does_not_depend_on_the_others(sizes: tuple) -> None:
    given = {name: None if t is None else t.float() for name, t in chunk_inputs(*sizes).items()}
    rows = ("x", "conv_state", "scan_state")
    together = mamba_chunk(*split(given))
    for i in range(len(given["x"])):
        alone = mamba_chunk(*split(given | {name: given[name][i : i + 1] for name in rows}))
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("sizes", CHUNKS)
def test_a_chunk_continues_its_states(sizes: tuple) -> None:
    given = {name: None if t is None else t.float() for name, t in chunk_inputs(*sizes).items()}
    whole = mamba_chunk(*split(given))
    states, out = {name: given[name] for name in ("conv_state", "scan_state")}, []
    for token in given["x"].split(1, dim=1):
        y, *after = mamba_chunk(*split(given | {"x": token} | states))
        states = dict(zip(states, after, strict=True))
        out.append(y)
    assert torch.equal(torch.cat(out, dim=1), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(states.values(), whole[1:], strict=True))


def test_chunk_operator() -> None:
    given = {name: None if t is None else t.float() for name, t in chunk_inputs(2, 8, 16, 4, 2, 4, True, 3).items()}
    *stream, weights = split(given)
    for seq_idx in (None, torch.tensor([[0, 0, 1], [0, 1, 1]])):
        torch.library.opcheck(torch.ops.seqssm.mamba_chunk.default, (*stream, *weights, seq_idx))


def test_bad_chunks_are_named() -> None:
    given = chunk_inputs(2, 8, 16, 4, 2, 4, False, 3)
    with pytest.raises(ValueError, match=r"\(b, l, d\)"):
        mamba_chunk(*split(given | {"x": given["x"][0]}), backend="reference")
    with pytest.raises(ValueError, match="seq_idx must have shape"):
        mamba_chunk(*split(given), seq_idx=torch.zeros(2, 2, dtype=torch.int32), backend="reference")
    with pytest.raises(ValueError, match="computes in float32"):
        mamba_chunk(*split(given))


def test_bad_arguments_are_named() -> None:
    given = layer(2, 8, 16, 4, 2, 4, False)
    for name, words in (("x_proj", "x_proj must have shape"), ("conv_state", "conv_state must have shape")):
        with pytest.raises(ValueError, match=words):
            mamba_step(*split(given | {name: torch.zeros(3, 3)}), backend="reference")
    with pytest.raises(ValueError, match="no gradient"):
        mamba_step(*split(given | {"D": given["D"].requires_grad_()}), backend="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 128, 256, 16, 8, 4, False), (3, 768, 1536, 16, 48, 4, True)])
def test_equals_the_formula_on_gpu(sizes: tuple, dtype: torch.dtype) -> None:
    check(sizes, dtype, "cuda", 1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
def test_operator_on_gpu() -> None:
    given = {k: t if t is None else t.float().cuda() for k, t in layer(2, 8, 16, 4, 2, 4, True).items()}
    *stream, weights = split(given)
    torch.library.opcheck(torch.ops.seqssm.mamba_step.default, (*stream, *weights))
