"""No kernel touches memory before the first or behind the last byte of its arguments, masked loads apart.

Every interpreter test of this folder runs with all memory ending at a closed page (conftest.py). Here it begins at one,
and what the kernels only ask the cache for, which the interpreter cannot do, is read.
"""

import faulthandler
import functools
import importlib
import os
import signal

import pytest
import torch
import triton
import triton.language as tl
from cases import Case, ConvCase, ScanCase, SSDCase, fixed_randn, inputs_in
from guarded import Edge, guard_launches, tight
from interpreter import assert_passes_interpreted, interpreted

from seqssm.kernels import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
    triton_tiles,
)

OPERATORS = {ScanCase: selective_scan, ConvCase: causal_conv1d, SSDCase: ssd}


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@triton.jit
def _write(x, at):  # type: ignore[no-untyped-def]
    tl.store(x + at, 1.0)


@interpreted
@pytest.mark.parametrize(("edge", "beyond"), [("begin", -1), ("end", 1000)])
def test_a_write_beyond_the_edge_ends_the_process(edge: Edge, beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guard_launches(monkeypatch, edge)
    x = torch.zeros(1000)
    for at in (0, 999):
        _write[(1,)](x, at)
    assert x.sum() == 2
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        _write[(1,)](x, beyond)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


@interpreted
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(l=9, d=3, n=2, packed=4, reverse=True, strided=True),
        ScanCase(l=9, d=4, n=1, g=2, reverse=(False, True)),
        ConvCase(l=9, d=18, packed=5, reverse=(True, False)),
        ConvCase(l=2, d=3, k=7, reverse=True, strided=True),
        SSDCase(l=33, h=2, p=3, n=5, g=2, packed=9, reverse=(False, True), D_p=True, strided=True),
    ],
    ids=["scan", "scan-both-directions", "conv", "conv-shorter-than-kernel", "ssd"],
)
def test_memory_begins_at_a_closed_page(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = guard_launches(monkeypatch, "begin")
    inputs = {name: tight(x).requires_grad_() for name, x in inputs_in(case, torch.float16).items()}
    options = case.options | ({} if case.options["seq_idx"] is None else {"seq_idx": tight(case.options["seq_idx"])})
    y, final_state = OPERATORS[type(case)](**inputs, **options, backend="triton")
    outputs = [y, final_state]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), [fixed_randn(x) for x in outputs])
    assert all(x.isfinite().all() for x in (*outputs, *gradients))
    assert launches() >= 3


@interpreted
@pytest.mark.usefixtures("tiny")
def test_a_whole_scan_begins_at_a_closed_page(monkeypatch: pytest.MonkeyPatch) -> None:
    guard_launches(monkeypatch, "begin")
    monkeypatch.setattr(importlib.import_module("seqssm.kernels.selective_scan.triton_single"), "_ENOUGH_PROGRAMS", 1)
    inputs = {name: tight(x) for name, x in inputs_in(ScanCase(l=5, d=3, n=16), torch.float16).items()}
    y, final_state = selective_scan(**inputs, delta_softplus=True, reverse=True, backend="triton")
    assert y.isfinite().all()
    assert final_state.isfinite().all()


@interpreted
def test_steps_and_norms_begin_at_a_closed_page(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = guard_launches(monkeypatch, "begin")
    for case, step, timed in (
        (ScanCase(l=1, d=5, n=3), functools.partial(selective_scan_step, delta_softplus=True), "u delta B C z"),
        (ConvCase(l=1, d=5, k=3), causal_conv1d_step, "x"),
        (SSDCase(l=1, h=3, p=5, n=7), functools.partial(ssd_step, dt_softplus=True), "x dt B C z"),
    ):
        token = {k: tight(x[:, 0] if k in timed.split() else x) for k, x in inputs_in(case, torch.float16).items()}
        assert step(token.pop("initial_state"), **token, backend="triton").isfinite().all()
    x, added = (torch.ones(3, 7).requires_grad_() for _ in range(2))
    total, y = add_rms_norm(x, added, torch.ones(7).requires_grad_(), 1e-5, backend="triton")
    (total.sum() + y.square().sum()).backward()
    assert launches() == 5


@triton.jit
def _read(pointers, LEVEL: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.load(pointers)


@interpreted
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("edge", ["begin", "end"])
def test_what_is_prefetched_is_there(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address asked for too early or too late would cost time, and hide a mistake in those that are read."""
    guard_launches(monkeypatch, edge)
    module = importlib.import_module("seqssm.kernels.selective_scan.triton")
    monkeypatch.setattr(module, "_PREFETCH", 2)
    for user in (triton_tiles, importlib.import_module("seqssm.kernels.selective_scan.triton_backward")):
        monkeypatch.setattr(user, "prefetch", _read)
    for case in (ScanCase(l=9, d=3, n=1, reverse=True), ScanCase(l=8, d=32, n=1)):
        inputs = {name: tight(x).requires_grad_() for name, x in inputs_in(case, torch.float16).items()}
        y, _ = selective_scan(**inputs, **case.options, backend="triton")
        assert torch.autograd.grad(y.float().sum(), inputs["u"])[0].isfinite().all()
