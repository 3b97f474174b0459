"""A whole training step as one CUDA graph: forward, backward, clipping and optimizer, replayed over and over."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig

# Windows of 101 bases, as those of many genomic benchmarks: no multiple of any tile, segment or chunk.
BATCH, LENGTH, STEPS, CLASSES = 16, 101, 12, 3
MODELS = {
    "mamba": BackboneConfig(d_model=64, n_layers=2, mixers={"m": {"class_path": "Mamba"}}),
    "mamba-tied": BackboneConfig(d_model=64, n_layers=1, mixers={"m": {"class_path": "Mamba"}}, bidirectional="tied"),
    "mamba2": BackboneConfig(
        d_model=64, n_layers=2, mixers={"m": {"class_path": "Mamba2", "init_args": {"headdim": 32, "d_state": 32}}}
    ),
}


class Classifier(nn.Module):
    """Tokens (b, l) to logits (b, CLASSES)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, config.d_model)
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.d_model, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.backbone(self.embedding(tokens))[0].mean(1))


class Training:
    """A model with its optimizer, and a step over data that stay where they are."""

    def __init__(self, kind: str, device: str) -> None:
        torch.manual_seed(0)
        self.model = Classifier(MODELS[kind]).to(device)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(5, (STEPS, BATCH, LENGTH), generator=generator).to(device)
        self.labels = torch.randint(CLASSES, (STEPS, BATCH), generator=generator).to(device)
        self.number = torch.zeros((), dtype=torch.long, device=device)
        self.losses = torch.zeros(STEPS, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, capturable=device == "cuda")

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        now = self.number[None]
        loss = F.cross_entropy(self.model(self.tokens.index_select(0, now)[0]), self.labels.index_select(0, now)[0])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.index_copy_(0, now, loss.detach()[None])
        self.number += 1

    def changing(self) -> list[Tensor]:
        """All that a step changes."""
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        return [self.number, self.losses, *(p.detach() for p in self.model.parameters()), *moments]

    def capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph of a stream of its own, as PyTorch asks for it, with everything as it was before.

        One stream a graph: those of one stream share cuBLAS's workspace, and must not run side by side.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before = [x.clone() for x in self.changing()]
            for _ in range(3):
                self.step()
            changed = self.changing()
            for x in changed[len(before) :]:  # the optimizer's own begin at zero, in the first step
                x.zero_()
            for x, old in zip(changed, before, strict=False):
                x.copy_(old)
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph


def in_order(replays: list[Callable[[], None]]) -> None:
    """Take turns, with other work between, which takes over whatever memory a graph would wrongly count on."""
    torch.cuda.empty_cache()
    for _ in range(STEPS):
        for replay in replays:
            replay()
        for size in (512, 1 << 14, 1 << 20, 1 << 24):
            torch.full((size,), float("nan"), device="cuda")


def assert_same_losses(actual: Tensor, eager: Tensor) -> None:
    assert actual.isfinite().all(), actual
    assert eager[0] != eager[-1]
    torch.testing.assert_close(actual, eager, rtol=1e-4, atol=1e-5)


def test_a_step_learns() -> None:
    """What is captured on a GPU, on the CPU."""
    training = Training("mamba", "cpu")
    before = [x.clone() for x in training.changing()]
    for _ in range(2):
        training.step()
    assert training.number == 2
    assert (training.losses[:2] > 0).all()
    assert not training.losses[2:].any()
    assert all(not torch.equal(x, old) for x, old in zip(training.changing(), before, strict=False))


@pytest.mark.gpu
@pytest.mark.parametrize("side", [False, True], ids=["default-stream", "side-stream"])
@pytest.mark.parametrize("kind", MODELS)
def test_replays_equal_eager_steps(kind: str, side: bool) -> None:
    eager, captured = Training(kind, "cuda"), Training(kind, "cuda")
    for _ in range(STEPS):
        eager.step()
    graph = captured.capture()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        in_order([graph.replay])
    torch.cuda.synchronize()
    assert captured.number == STEPS
    assert_same_losses(captured.losses, eager.losses)


@pytest.mark.gpu
def test_graphs_run_side_by_side() -> None:
    """Several models train at once, each a graph that was captured, and is replayed, on a stream of its own."""
    eager = {kind: Training(kind, "cuda") for kind in MODELS}
    for training in eager.values():
        for _ in range(STEPS):
            training.step()
    together = [(kind, Training(kind, "cuda")) for kind in MODELS for _ in range(2)]
    graphs = [(training.capture(), torch.cuda.Stream()) for _, training in together]
    torch.cuda.synchronize()

    def replay_on(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Callable[[], None]:
        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay

    in_order([replay_on(*graph) for graph in graphs])
    torch.cuda.synchronize()
    for kind, training in together:
        assert_same_losses(training.losses, eager[kind].losses)
