"""Chunked backpropagation against one pass: results, every gradient, random numbers, precision, memory, refusals."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig, LanguageModel, MixerSpec
from seqssm.errors import UserError
from seqssm.longcontext.chunked import check_chunkable, fold, fold_backbone, next_token_loss
from seqssm.mixers import State

MIXERS = {
    "m": MixerSpec(class_path="Mamba", init_args={"d_state": 4}),
    "2": MixerSpec(class_path="Mamba2", init_args={"d_state": 8, "headdim": 8}),
    "s": MixerSpec(class_path="S4D", init_args={"d_state": 8}),
    "a": MixerSpec(class_path="Attention", init_args={"heads": 2}),
    "w": MixerSpec(class_path="Attention", init_args={"heads": 2, "window": 4}),
}
LENGTH = 41


def make_config(**changes) -> BackboneConfig:
    settings = {"d_model": 16, "n_layers": 2, "mixers": MIXERS, "pattern": "m", "backend": "torch", **changes}
    return BackboneConfig(**settings)


def make_model(**changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(11, make_config(**changes)).double()


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(1))


def language_loss(model: LanguageModel, ids: Tensor, chunk: int, **options) -> tuple[Tensor, State]:
    def embed(start: int, stop: int) -> Tensor:
        return model.embedding(ids[:, start:stop].long())

    return next_token_loss(model.backbone, embed, model.logits, ids, chunk_length=chunk, modules=[model], **options)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [4, 13, 40, 41, 64])
@pytest.mark.parametrize(
    "config",
    [
        {"pattern": "m"},
        {"pattern": "2"},
        {"pattern": "s"},
        {"pattern": "m2s", "n_layers": 3, "mlp_ratio": 2.0},
        {"pattern": "m2", "checkpoint_activations": True},
        {"pattern": "m2", "backend": "reference"},
    ],
    ids=["Mamba", "Mamba2", "S4D", "mixed with MLP", "recomputed blocks", "reference kernels"],
)
def test_next_token_loss_and_gradients_equal_one_pass(config: dict, chunk: int) -> None:
    model, ids = make_model(**config), tokens()
    logits, last = model(ids)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    whole = gradients(model)
    loss, state = language_loss(model, ids.to(torch.uint8), chunk)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    chunked = gradients(model)
    assert chunked.keys() == whole.keys() == dict(model.named_parameters()).keys()
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in last.items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.parametrize("kept", [0, 1, 3, 9])
def test_chunks_that_are_kept_run_once(kept: int) -> None:
    model, ids = make_model(pattern="m2", dropout=0.3), tokens()
    torch.manual_seed(5)
    loop_loss(model, ids, 8).backward()  # six chunks
    whole, starts = gradients(model), []

    def embed(start: int, stop: int) -> Tensor:
        starts.append(start)
        return model.embedding(ids[:, start:stop])

    def reduce(carry: dict[str, Tensor], y: Tensor, start: int) -> dict[str, Tensor]:
        logits, target = model.logits(y[:, : LENGTH - 1 - start]), ids[:, start + 1 : start + y.shape[1] + 1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return {"loss": carry["loss"] + losses.sum()}

    torch.manual_seed(5)
    carry, _ = fold_backbone(
        model.backbone, embed, reduce, {"loss": torch.zeros((), dtype=torch.float64)},
        length=LENGTH, chunk_length=8, modules=[model], kept=kept,
    )  # fmt: skip
    (carry["loss"] / (2 * (LENGTH - 1))).backward()
    assert starts == [0, 8, 16, 24, 32, 40] + [start for start in (40, 32, 24, 16, 8, 0) if start < 48 - 8 * kept]
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)


def test_weights_say_how_much_a_token_counts() -> None:
    model, ids = make_model(), tokens()
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = nn.functional.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    torch.testing.assert_close(language_loss(model, ids, 8, weights=weights)[0], expected)
    nothing, _ = language_loss(model, ids, 8, weights=torch.zeros_like(weights))  # a window of N
    nothing.backward()
    assert nothing == 0
    assert not model.embedding.weight.grad.any()


def test_gradients_reach_the_state_that_enters_and_leave_by_the_last() -> None:
    model = make_model(pattern="m2s", n_layers=3)
    ids, more = tokens().split([20, 21], dim=1)
    with torch.no_grad():
        state = {name: value + 0.1 for name, value in model.init_state(2).items()}

    def run(chunk: int) -> dict[str, Tensor]:
        entering = {name: value.clone().requires_grad_() for name, value in state.items()}
        first, between = language_loss(model, ids, chunk, state=entering)
        second, last = language_loss(model, more, chunk, state=between)
        (first + second + sum((v**2).mean() for v in last.values())).backward()
        return {**gradients(model), **{f"state {name}": value.grad for name, value in entering.items()}}

    whole, chunked = run(64), run(6)
    assert whole.keys() == chunked.keys()
    for name, value in whole.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(chunked[name], value, rtol=1e-9, atol=1e-12)


def loop_loss(model: LanguageModel, ids: Tensor, chunk: int) -> Tensor:
    """Chunk by chunk with autograd keeping everything: the same numbers, not the same memory."""
    state, total = None, torch.zeros((), dtype=torch.float64)
    for start in range(0, ids.shape[1], chunk):
        y, state = model.backbone(model.embedding(ids[:, start : start + chunk]), state)
        target = ids[:, start + 1 : start + chunk + 1]
        if target.shape[1]:
            logits = model.logits(y[:, : target.shape[1]])
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            total = total + losses.sum(dtype=torch.float64)
    return (total / (ids[:, 1:].numel())).to(torch.promote_types(model.embedding.weight.dtype, torch.float32))


def test_dropout_is_replayed_and_the_generator_goes_on_undisturbed() -> None:
    model, ids = make_model(dropout=0.3), tokens()
    torch.manual_seed(5)
    expected = loop_loss(model, ids, 10)
    expected.backward()
    whole, following = gradients(model), torch.rand(3)
    torch.manual_seed(5)
    loss, _ = language_loss(model, ids, 10)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.rand(3), following, rtol=0, atol=0)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_replayed(backward_inside: bool) -> None:
    model, ids = make_model(pattern="m2").float(), tokens()
    exact = make_model(pattern="m2")
    loop_loss(exact, ids, 10).backward()
    truth = gradients(exact)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loop_loss(model, ids, 10)
    expected.backward()
    whole = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            language_loss(model, ids, 10)  # must not leave casts behind that hide weights from gradients
        loss, _ = language_loss(model, ids, 10)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss.dtype == torch.float32
    for name, value in gradients(model).items():
        # The same roundings in the same places: as far from the truth as autograd's own, to a sum's order.
        ours, theirs = ((g.double() - truth[name]).norm() / truth[name].norm() for g in (value, whole[name]))
        assert ours <= 1.05 * theirs + 1e-3, name


def test_accumulates_like_any_other_gradient() -> None:
    model, ids = make_model(), tokens()
    language_loss(model, ids, 10)[0].backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    language_loss(model, ids, 10)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])
    seen: list[str] = []
    model.embedding.weight.register_post_accumulate_grad_hook(lambda p: seen.append("embedding"))
    language_loss(model, ids, 10)[0].backward()
    assert seen == ["embedding"]  # once, not a chunk at a time: what distributed data parallel counts on


class ChunkedLoss(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return language_loss(self.model, ids, 10)[0]


def test_distributed_data_parallel_takes_the_gradients(tmp_path: Path) -> None:
    model, ids = make_model(pattern="m2"), tokens()
    language_loss(model, ids, 64)[0].backward()
    whole = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(ChunkedLoss(model))
        for _ in range(2):  # a second step complains about gradients that the first left unfinished
            model.zero_grad()
            parallel(ids).backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)


class Held:
    """A tensor that autograd saved, and how many bytes of them are alive."""

    live, peak = 0, 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Held.live += tensor.nbytes
        Held.peak = max(Held.peak, Held.live)

    def __del__(self) -> None:
        Held.live -= self.tensor.nbytes


@pytest.fixture
def saved_bytes() -> Iterator[type[Held]]:
    Held.live = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield Held


def test_memory_does_not_grow_with_the_sequence(saved_bytes: type[Held]) -> None:
    model, peaks = make_model(), []
    for length, chunk in ((32, 16), (256, 16), (256, 256)):
        before = saved_bytes.peak = saved_bytes.live
        language_loss(model, tokens(length), chunk)[0].backward()
        peaks.append(saved_bytes.peak - before)
    assert 0 < peaks[1] < 1.01 * peaks[0]
    assert peaks[2] > 10 * peaks[1]


def test_unfinished_business_is_refused() -> None:
    weight, forgotten = (torch.ones(3, requires_grad=True) for _ in range(2))
    result = fold(lambda i, c: {"x": c["x"] * weight + forgotten}, 3, {"x": torch.ones(3)}, [weight])
    with pytest.raises(RuntimeError, match="not among its parameters"):
        result["x"].sum().backward()
    result = fold(lambda i, c: {"x": c["x"] * weight}, 3, {"x": torch.ones(3)}, [weight])
    result["x"].sum().backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, torch.full((3,), 3.0))
    with pytest.raises(RuntimeError, match="call backward\\(\\) once"):
        result["x"].sum().backward()
    result = fold(lambda i, c: {"x": c["x"] * weight}, 3, {"x": torch.ones(3)}, [weight])
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified between the forward and the backward"):
        result["x"].sum().backward()


def test_carries_that_pass_through_or_end() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    start = torch.tensor(3.0, requires_grad=True)

    def step(i: int, carry: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {"kept": carry["kept"], "count": carry["count"] + 1}
        return {**new, "fresh": weight * i} if i == 2 else new

    last = fold(step, 3, {"kept": start, "count": torch.tensor(0)}, [weight])
    assert last["count"] == 3
    assert not last["count"].requires_grad
    (last["kept"] * 5 + last["fresh"]).backward()
    assert (start.grad, weight.grad) == (5, 2)


@pytest.mark.parametrize(
    ("config", "chunk", "message"),
    [
        ({"pattern": "ma"}, 16, r"layer 1 of the backbone is Attention, whose memory grows"),
        ({"pattern": "mw"}, 16, r"layer 1 of the backbone is Attention"),
        ({"bidirectional": "tied"}, 16, "reads forward only: set backbone.bidirectional to none"),
        ({"reverse_complement": True}, 16, "reads forward only"),
        ({}, 3, r"chunks of 3 positions, shorter than the convolution window of layer 0 \(Mamba, d_conv 4\)"),
        ({}, 0, "must be a positive number"),
    ],
)
def test_what_cannot_be_chunked_is_refused_before_any_work(config: dict, chunk: int, message: str) -> None:
    backbone = Backbone(make_config(**config))
    with pytest.raises(UserError, match=message):
        check_chunkable(backbone, chunk)
    with pytest.raises(UserError, match=message):
        fold_backbone(backbone, lambda a, b: torch.zeros(1), lambda c, y, s: c, {}, length=64, chunk_length=chunk)
