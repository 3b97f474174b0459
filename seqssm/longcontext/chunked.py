"""Exact chunked backpropagation: gradients through a sequence of any length in the activation memory of one chunk.

A causal backbone carries a state from chunk to chunk. The forward pass runs chunk by chunk without gradients and keeps
only what crosses the borders: the state, and whatever a loss or a pooling has gathered so far. The backward pass takes
the chunks from the last to the first, recomputes one at a time from the state that entered it, and hands the gradient
of that state on to the chunk before. Nothing is truncated: the gradients are those of one pass over the sequence, at
the cost of a second forward pass (that of gradient checkpointing: Chen et al., 2016, along the sequence). The last
chunk is the first one needed and is not run twice; where memory allows, nor are some before it.

Inside, all of it is one node of autograd, so a training step stays ordinary: ``loss.backward()``, gradient
accumulation, clipping, mixed precision and distributed data parallel see each parameter's gradient once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqssm.backbone import Backbone
from seqssm.errors import UserError
from seqssm.mixers import State

Carry = dict[str, Tensor]
"""What crosses a border between chunks, by name."""


def check_chunkable(backbone: Backbone, chunk_length: int, key: str = "chunk_length") -> None:
    """Refuse, before any work, a backbone or a chunk that cannot be trained chunk by chunk.

    Args:
        backbone: the model.
        chunk_length: positions of the backbone in a chunk.
        key: what the chunk length is called where the user set it.

    Raises:
        UserError: the backbone reads both ways, or holds attention, whose memory grows with the sequence; or a chunk
            is shorter than the window of a convolution.
    """
    if chunk_length < 1:
        raise UserError(f"{key} is {chunk_length}: it must be a positive number of positions")
    for i, block in enumerate(backbone.blocks):
        kind = type(block.mixer).__name__
        if not block.mixer.recurrent:
            raise UserError(
                f"{key}: layer {i} of the backbone is {kind}, whose memory grows with the sequence; leave it out of "
                f"backbone.pattern, or set {key} to 0"
            )
        if not block.mixer.causal:
            raise UserError(
                f"{key} needs a backbone that reads forward only: set backbone.bidirectional to none and "
                f"backbone.reverse_complement to false, or {key} to 0"
            )
        window = getattr(block.mixer, "d_conv", 1)
        if chunk_length < window:
            raise UserError(
                f"{key} gives chunks of {chunk_length} positions, shorter than the convolution window of layer {i} "
                f"({kind}, d_conv {window}); make chunks longer, some 2^16 positions or more are fast"
            )


def fold_backbone(
    backbone: Backbone,
    embed: Callable[[int, int], Tensor],
    reduce: Callable[[Carry, Tensor, int], Carry],
    carry: Carry,
    *,
    length: int,
    chunk_length: int,
    modules: Iterable[nn.Module] = (),
    state: State | None = None,
    offload: bool = False,
    kept: int = 1,
) -> tuple[Carry, State]:
    """Run a causal backbone over a sequence chunk by chunk and reduce its outputs, with exact gradients.

    The whole sequence of embeddings, or of outputs, never exists: ``embed`` makes those of one chunk from tokens, and
    ``reduce`` takes what a pooling or a loss needs from its outputs. Both are called again in the backward pass and
    must give the same then (random numbers are replayed; a batch normalisation would update its statistics twice).

    Args:
        backbone: causal, without attention.
        embed: ``embed(start, stop)`` -> x (b, stop - start, d), the embeddings of positions start to stop.
        reduce: ``reduce(carry, y, start)`` -> the carry that includes the outputs y (b, l, d) of the positions from
            ``start`` on. Carries are dicts of tensors, on the device, and do not grow.
        carry: what ``reduce`` starts from.
        length: positions in the sequence.
        chunk_length: positions in a chunk; the last one may be shorter. A sequence that fits in one is run as usual.
        modules: those whose parameters ``embed`` and ``reduce`` use.
        state: the state that enters at the first position, with gradients if it has any; None at a sequence's start.
        offload: keep what crosses the borders in pinned memory of the host, for many chunks on a GPU.
        kept: how many of the last chunks keep their activations instead of being run again: time against memory, but
            the first costs no memory, as each chunk's activations are there once in turn.

    Returns:
        The carry behind the last chunk and the backbone's state there, both with gradients.

    Raises:
        UserError: as :func:`check_chunkable`.
    """
    check_chunkable(backbone, chunk_length)
    if length < 1:
        raise ValueError(f"a sequence has one position at least, got {length}")

    def step(chunk: int, past: Carry) -> Carry:
        start = chunk * chunk_length
        x = embed(start, min(start + chunk_length, length))
        y, new = backbone(x, _under(STATE, past) or None)
        return {**_named(STATE, new), **_named(CARRY, reduce(_under(CARRY, past), y, start))}

    parameters = [p for module in (backbone, *modules) for p in module.parameters()]
    first = {**_named(STATE, state or {}), **_named(CARRY, carry)}
    last = fold(step, -(-length // chunk_length), first, parameters, offload=offload, kept=kept)
    return _under(CARRY, last), _under(STATE, last)


def next_token_loss(
    backbone: Backbone,
    embed: Callable[[int, int], Tensor],
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    chunk_length: int,
    modules: Iterable[nn.Module] = (),
    weights: Tensor | None = None,
    state: State | None = None,
    offload: bool = False,
) -> tuple[Tensor, State]:
    """The mean cross entropy of predicting each token of a sequence from those before it, chunk by chunk.

    Args:
        backbone, embed, chunk_length, modules, state, offload: as in :func:`fold_backbone`; ``modules`` are also those
            of ``logits``.
        logits: outputs of the backbone (b, l, d) to logits (b, l, c) of the token after each.
        tokens: (b, l) integers below c of any integer dtype, on any device: chunks are moved to the backbone's. At
            least two.
        weights: (b, l) how much the prediction of each token counts; the first column does not. 1 each when None.

    Returns:
        The loss in nats a token, a float32 scalar (float64 for a float64 model), and the state behind the last token.
        Where no token counts, the loss is 0.
    """
    device = backbone.norm.weight.device
    length = tokens.shape[1]
    if length < 2:
        raise ValueError("one token leaves nothing to predict: give two at least")

    def reduce(carry: Carry, y: Tensor, start: int) -> Carry:
        stop = min(start + y.shape[1], length - 1)
        if stop <= start:
            return carry
        target = tokens[:, start + 1 : stop + 1].to(device).long()
        loss = F.cross_entropy(logits(y[:, : stop - start]).flatten(0, 1), target.flatten(), reduction="none")
        if weights is None:
            return {"loss": carry["loss"] + loss.sum(dtype=torch.float64), "count": carry["count"] + target.numel()}
        weight = weights[:, start + 1 : stop + 1].to(device, loss.dtype).flatten()
        total = carry["loss"] + (loss * weight).sum(dtype=torch.float64)
        return {"loss": total, "count": carry["count"] + weight.sum(dtype=torch.float64)}

    zero = torch.zeros((), dtype=torch.float64, device=device)
    carry, state = fold_backbone(
        backbone,
        embed,
        reduce,
        {"loss": zero, "count": zero},
        length=length,
        chunk_length=chunk_length,
        modules=modules,
        state=state,
        offload=offload,
    )
    wide = torch.promote_types(backbone.norm.weight.dtype, torch.float32)
    count = carry["count"].clamp(min=torch.finfo(torch.float64).tiny)
    return (carry["loss"] / count).to(wide), state


def fold(
    step: Callable[[int, Carry], Carry],
    steps: int,
    carry: Carry,
    parameters: Iterable[Tensor],
    *,
    offload: bool = False,
    kept: int = 1,
) -> Carry:
    """``for i in range(steps): carry = step(i, carry)``, differentiable in the memory of one step.

    Args:
        step: a function of the number of the step, the carry and ``parameters`` alone. It is called twice for each
            step but the last ones, the second time in the backward pass with the same random numbers and the same
            autocast; it must not write to the carry it is given. The names in a carry may change from step to step.
        steps: how many, at least 1.
        carry: what enters the first step.
        parameters: every tensor that needs a gradient and that ``step`` reads, apart from the carry.
        offload: keep the carries between steps in pinned memory of the host rather than on the GPU.
        kept: how many of the last steps are called once, in the memory of so many.

    Returns:
        The last carry. Its gradients reach ``parameters`` and the first carry; there are no second derivatives.

    Raises:
        RuntimeError: in the backward pass: ``step`` uses a tensor that needs a gradient and is not among
            ``parameters``, one of these was modified since the forward pass, or the backward pass runs a second time.
    """
    if steps < 1 or kept < 0:
        raise ValueError(f"a fold has one step at least, and keeps none at least; got {steps} and {kept}")
    needed = [p for p in {id(p): p for p in parameters}.values() if p.requires_grad]
    differentiable = bool(needed) or any(value.requires_grad for value in carry.values())
    if steps <= max(kept, 1) or not (differentiable and torch.is_grad_enabled()):
        for i in range(steps):
            carry = step(i, carry)
        return carry
    run = _Run(step, steps, kept, tuple(carry), offload, next(iter([*needed, *carry.values()])).device)
    values = _Fold.apply(run, *carry.values(), *needed)
    return dict(zip(run.last_names, values, strict=True))


# ---- inside --------------------------------------------------------------------------------------------------------

STATE, CARRY = "state/", "carry/"


def _named(prefix: str, values: Carry) -> Carry:
    return {prefix + name: value for name, value in values.items()}


def _under(prefix: str, values: Carry) -> Carry:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


class _Run:
    """One forward pass: what its backward pass has to know."""

    def __init__(
        self,
        step: Callable[[int, Carry], Carry],
        steps: int,
        kept: int,
        names: tuple[str, ...],
        offload: bool,
        device: torch.device,
    ) -> None:
        self.step, self.steps, self.names, self.device = step, steps, names, device
        self.again = steps - kept  # the first steps, which are run again
        self.offload = offload and device.type == "cuda"
        self.last_names: tuple[str, ...] = ()
        self.borders: list[tuple[Carry, list[Tensor]]] = []  # for each of them: what entered it, the generators' states
        self.graphs: list[tuple[Carry, Carry]] = []  # for each of the others: what entered it, and what it gave
        self.cast, self.cast_dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def forward(self, carry: Carry) -> Carry:
        with torch.no_grad(), self._autocast():
            for i in range(self.again):
                self.borders.append((self._keep(carry), self._generators()))
                carry = self.step(i, carry)
        with torch.enable_grad(), self._autocast():
            for i in range(self.again, self.steps):
                leaves = _leaves(carry)
                outputs = self.step(i, dict(leaves))
                self.graphs.append((leaves, outputs))
                carry = {name: value.detach() for name, value in outputs.items()}
        self.last_names = tuple(carry)
        return carry

    def graph(self, i: int) -> tuple[Carry, Carry]:
        """What entered step i, as leaves, and what it gives, with the graph between; to be called from the last on."""
        if len(self.borders) + len(self.graphs) != i + 1:
            raise RuntimeError("a fold forgets its steps as it goes back through them: call backward() once")
        if self.graphs:
            return self.graphs.pop()
        kept, generators = self.borders.pop()
        leaves = _leaves({name: value.to(self.device, non_blocking=True) for name, value in kept.items()})
        with self._replay(generators), torch.enable_grad(), self._autocast():
            return leaves, self.step(i, dict(leaves))

    def _autocast(self) -> torch.autocast:
        # A cast of a weight that is cached without gradients would hide the weight from a later step that needs them.
        return torch.autocast(self.device.type, self.cast_dtype, self.cast, cache_enabled=False)

    def _keep(self, carry: Carry) -> Carry:
        if not self.offload:
            # A view would keep all of its chunk alive.
            return {k: v.clone() if v.untyped_storage().nbytes() > v.nbytes else v for k, v in carry.items()}
        return {
            name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            for name, value in carry.items()
        }

    def _generators(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    @contextmanager
    def _replay(self, generators: Sequence[Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            on_gpu = self.device.type == "cuda"
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if on_gpu else []))
            torch.set_rng_state(generators[0])
            if on_gpu:
                torch.cuda.set_rng_state(generators[1], self.device)
            yield


def _leaves(carry: Carry) -> Carry:
    return {
        name: value.detach().requires_grad_(value.is_floating_point() or value.is_complex())
        for name, value in carry.items()
    }


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        # Not among the saved tensors, whose hooks may hand back copies: gradients are wanted for these very objects.
        ctx.parameters = tensors[len(run.names) :]
        ctx.versions = [p._version for p in ctx.parameters]
        first = zip(run.names, (value.detach() for value in tensors), strict=False)
        outputs = run.forward(dict(first))
        # An output that is an input would be taken for one that was changed in place.
        inputs = {value.data_ptr() for value in tensors}
        last = tuple(value.clone() if value.data_ptr() in inputs else value for value in outputs.values())
        ctx.mark_non_differentiable(*(v for v in last if not (v.is_floating_point() or v.is_complex())))
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        parameters: tuple[Tensor, ...] = ctx.parameters
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError("a weight was modified between the forward and the backward pass of a fold")
        totals: list[Tensor | None] = [None] * len(parameters)
        entering: dict[str, Tensor] = {n: g for n, g in zip(run.last_names, gradients, strict=True) if g is not None}
        for i in reversed(range(run.steps)):
            carry, outputs = run.graph(i)
            roots = [name for name in entering if outputs[name].requires_grad]
            leaves = [name for name, value in carry.items() if value.requires_grad]
            if i == run.steps - 1:
                _check_complete([outputs[name] for name in roots], [*parameters, *carry.values()])
            if not roots:
                entering = {}
                break
            found = torch.autograd.grad(
                [outputs[name] for name in roots],
                [*(carry[name] for name in leaves), *parameters],
                [entering[name] for name in roots],
                allow_unused=True,
            )
            entering = {n: g for n, g in zip(leaves, found, strict=False) if g is not None}
            _add(totals, found[len(leaves) :])
        run.borders.clear()
        run.graphs.clear()
        own = (g if g is None else g.to(p.dtype) for g, p in zip(totals, parameters, strict=True))
        return None, *(entering.get(name) for name in run.names), *own


def _add(totals: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Running sums, in float32 at least: thousands of chunks add up, also for 16-bit weights."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = totals[i]
        if total is None:
            totals[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        else:
            pairs.append((total, gradient))
    if pairs:
        torch._foreach_add_([total for total, _ in pairs], [gradient for _, gradient in pairs])


def _check_complete(roots: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise unless every leaf under the roots is known: the gradient of another would be lost without a word."""
    ids = {id(tensor) for tensor in known}
    todo: list[Any] = [root.grad_fn for root in roots]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            raise RuntimeError(
                f"a step of the fold uses a tensor {tuple(leaf.shape)} that needs a gradient and is not among its "
                "parameters; name it, or the module that holds it"
            )
        todo += [following for following, _ in node.next_functions]
