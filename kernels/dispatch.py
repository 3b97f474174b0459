"""Shared by every kernel's ``op.py``: argument checks, the choice of a backend, registration with ``torch.library``."""

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("reference", "torch", "numba", "triton")
_MODULES = {"torch": "vectorized", "numba": "cpu", "triton": "triton"}
# Looked up once, at import: torch.compile then sees constants.
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("numba", "triton")}
_LIBRARY = torch.library.Library("seqssm", "FRAGMENT")


def define_operator(
    name: str, kernel: Callable, fake: Callable, mutates_args: Sequence[str] = ()
) -> torch._ops.OpOverload:
    """Register ``torch.ops.seqssm.<name>`` with its schema read off ``kernel``'s annotations.

    What ``torch.library.custom_op`` does, without its import of the compiler at the first call (seconds) and without
    its cost a call (tens of microseconds). Results must not alias inputs. Give a gradient with
    ``torch.library.register_autograd``.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=mutates_args)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"seqssm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.seqssm, name).default


def differentiable(
    name: str, kernel: Callable, fake: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    """``define_operator`` with a gradient, and a short way past the dispatcher where nothing needs it.

    The operator is what ``torch.compile``, fake tensors, transforms and tensor subclasses see. Plain tensors are
    computed with right away, under a ``torch.autograd.Function``: the operator's registered gradient costs a third of a
    millisecond of CPU a call, more than a small kernel takes on a GPU.

    Args:
        kernel: the function, as :func:`define_operator` takes it.
        fake: shapes of its results.
        setup_context, backward: as ``torch.library.register_autograd`` takes them.
    """
    operator = define_operator(name, kernel, fake)
    torch.library.register_autograd(f"seqssm::{name}", backward, setup_context=setup_context)

    def forward_eagerly(ctx, *inputs):  # type: ignore[no-untyped-def]
        outputs = kernel(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    members = {"forward": staticmethod(forward_eagerly), "backward": staticmethod(backward)}
    eager_function: Any = type(name, (torch.autograd.Function,), members)

    def call(*inputs):  # type: ignore[no-untyped-def]
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            _refuse_forward_mode(inputs)
        if not _eager(inputs):
            return operator(*inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return eager_function.apply(*inputs)
        return kernel(*inputs)

    return call


def once_differentiable(name: str, kernel: Callable, fake: Callable) -> Callable:
    """``define_operator`` for a backward pass, called as :func:`differentiable`; a gradient of it is refused."""
    operator = define_operator(name, kernel, fake)
    torch.library.register_autograd(f"seqssm::{name}", _refuse_second_derivative)

    def call(*inputs):  # type: ignore[no-untyped-def]
        # Gradients are enabled in a backward pass only where a second one is to come: the operator refuses it.
        return operator(*inputs) if torch.is_grad_enabled() or not _eager(inputs) else kernel(*inputs)

    return call


def gradients_like(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Contiguous gradients in the dtypes of ``inputs``, the first of which is there. A custom operator returns tensors
    only: an absent input's gradient is an empty one."""
    first = inputs[0]
    assert first is not None
    result = []
    for x, gradient in zip(inputs, gradients, strict=True):
        if x is None or gradient is None:
            result.append(first.new_empty(0))
        elif gradient.dtype == x.dtype and gradient.is_contiguous():
            result.append(gradient)
        else:
            result.append(gradient.to(x.dtype).contiguous())
    return tuple(result)


def _refuse_second_derivative(*_: object) -> None:
    raise NotImplementedError("the kernels have no second derivative: use backend='reference' for one")


def _refuse_forward_mode(inputs: Sequence[object]) -> None:
    """Torch itself drops a tangent that an operator knows nothing of, and gives zeros for the derivative."""
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("the kernels have no forward-mode derivative: use backend='reference' for one")


def _eager(inputs: Sequence[object]) -> bool:
    """Whether the inputs are plain tensors, and nothing traces or transforms what is done with them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor))


_PLAIN = (Tensor, torch.nn.Parameter)


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_shape(name: str, tensor: Tensor | None, shape: Sequence[int], dims: str) -> None:
    """Raise unless ``tensor`` is None, or floating point with ``shape``; ``dims`` names it, as in ``"(b, l, d)"``."""
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {dims} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_seq_idx(seq_idx: Tensor | None, batch: int, length: int) -> None:
    """Raise unless ``seq_idx`` is None or an integer tensor (b, l)."""
    if seq_idx is None:
        return
    if tuple(seq_idx.shape) != (batch, length):
        raise ValueError(f"seq_idx must have shape (b, l) = {(batch, length)}, got {tuple(seq_idx.shape)}")
    if seq_idx.is_floating_point() or seq_idx.is_complex() or seq_idx.dtype == torch.bool:
        raise ValueError(f"seq_idx must be an integer tensor, got {seq_idx.dtype}")


def check_devices(**tensors: Tensor | None) -> None:
    """Raise unless all tensors that are given live on one device."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(f"{name} is on {tensor.device}, {first[0]} on {first[1]}: move them to one device")


def check_inference(op: str, *tensors: Tensor | None) -> None:
    """Raise when a step function, which updates its state in place, is asked for gradients."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{op}_step has no gradient: call it under torch.no_grad(), or {op} with initial_state when training"
        )


def directions(reverse: bool | Sequence[bool], parts: int | None = None) -> tuple[bool, ...]:
    """One direction a group: ``reverse`` spread over ``parts`` groups (one when None), or checked to have as many."""
    if isinstance(reverse, bool):
        return (reverse,) * (parts or 1)
    result = tuple(bool(r) for r in reverse)
    if not result or (parts is not None and len(result) != parts):
        raise ValueError(f"reverse must be a bool or one bool a group ({parts or 'at least 1'}), got {len(result)}")
    return result


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scan states are float64 for float64 inputs and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose_backend(op: str, backend: str, tensor: Tensor, available: Sequence[str] = BACKENDS) -> str:
    """The concrete backend for ``backend`` (possibly ``"auto"``) on the device and dtype of ``tensor``.

    ``auto`` is a fixed rule, never a trial: float64 -> torch; CUDA -> triton; CPU -> numba; anything else -> torch,
    where a backend that ``op`` does not have (``available``) is passed over for torch. Raises ValueError for a backend
    that cannot take this tensor and ImportError for one whose package is missing; the message names the remedy.
    """
    device, dtype = tensor.device.type, tensor.dtype
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "numba"}.get(device, "torch") if dtype != torch.float64 else "torch"
        backend = backend if backend in available else "torch"
    if backend not in available:
        raise ValueError(f"{op} has no backend {backend!r}: choose 'auto' or one of {', '.join(available)}")
    if backend in ("numba", "triton"):
        if dtype == torch.float64:
            raise ValueError(f"backend {backend!r} of {op} computes in float32: for float64 use backend='torch'")
        if backend == "numba" and device != "cpu":
            raise ValueError(f"backend 'numba' of {op} runs on the CPU, not on {device}: use backend='auto'")
        if backend == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' of {op} needs CUDA tensors, got {device}: use backend='auto', "
                "or set TRITON_INTERPRET=1 before Python starts to run it slowly on the CPU"
            )
        if not _INSTALLED[backend]:
            raise ImportError(f"backend {backend!r} of {op} needs the package: pip install {backend}")
    return backend


def load_backend(op: str, backend: str) -> ModuleType:
    """The module of a concrete backend, imported on first use: nobody pays for a compiler that he does not need."""
    return importlib.import_module(f"seqssm.kernels.{op}.{_MODULES[backend]}")


def has_backend(op: str, backend: str) -> bool:
    """Whether the kernel ``op`` has a module for ``backend``."""
    return backend == "reference" or importlib.util.find_spec(f"seqssm.kernels.{op}.{_MODULES[backend]}") is not None


_precision_lock = threading.Lock()
_precision_users = 0
_precision_saved: dict[Any, str] = {}


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Matrix products in the dtype of their operands, whatever the caller allows elsewhere.

    Autocast would take them to 16 bits, and ``torch.set_float32_matmul_precision`` to TF32 on a GPU or to bfloat16 on
    some CPUs. That setting belongs to the process, and backward runs in another thread than forward: the first one in
    sets it, the last one out puts it back.
    """
    global _precision_users
    with _precision_lock:
        if _precision_users == 0:
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                if backend.fp32_precision not in ("none", "ieee"):
                    _precision_saved[backend] = backend.fp32_precision
                    backend.fp32_precision = "ieee"
        _precision_users += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                while _precision_saved:
                    backend, precision = _precision_saved.popitem()
                    backend.fp32_precision = precision
