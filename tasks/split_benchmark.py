"""How much faster processes train that share the length of a sequence, and how equal: one step of DNA classification.

    torchrun --nproc-per-node 2 -m seqssm.tasks.split_benchmark --length 2097152

times one training step (forward, backward and the mean of the gradients over the processes, as data parallel takes it)
of a causal classifier: the whole length in the first process while the others wait, its share alone in each of them,
and the length split over all. NCCL on GPUs, under bfloat16 autocast; gloo on CPUs, in float32. The gradients of the
split step are held against those of the whole one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seqssm.backbone import BackboneConfig
from seqssm.files import atomic_write
from seqssm.longcontext.parallel import LengthSplit
from seqssm.tasks.dna import DNAClassification

LABELS = ["a", "b"]


def main(arguments: list[str] | None = None) -> None:
    """Run in every process of ``torchrun``; the first one prints a table and writes ``--json``."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m seqssm.tasks.split_benchmark",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--length", type=int, default=1 << 21, help="bases of the sequence")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--two-way", action="store_true", help="read both ways, with shared projections")
    parser.add_argument("--checkpointed", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, of which the median counts; default 10")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        report = _compare(args, device)
    finally:
        dist.destroy_process_group()
    if report is None:
        return
    print(
        f"{args.layers} x {args.d_model}, {args.length:,} bases, {report['processes']} processes on {report['device']}"
    )
    print("| | ms (median) | ms (fastest) | peak GiB |\n|---|--:|--:|--:|")
    for name, row in report["steps"].items():
        print(f"| {name} | {row['median_ms']:.1f} | {row['fastest_ms']:.1f} | {row['peak_gib']:.1f} |")
    print(
        f"{report['speedup']:.2f} times as fast by medians ({report['speedup_fastest']:.2f} by the fastest steps); "
        f"gradients differ by {report['gradient_error']:.1e}"
    )
    if args.json is not None:
        with atomic_write(args.json) as file:
            json.dump(report, file, indent=2)


def _compare(args: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    split = LengthSplit()
    torch.manual_seed(0)
    config = BackboneConfig(
        d_model=args.d_model,
        n_layers=args.layers,
        bidirectional="tied" if args.two_way else "none",
        checkpoint_activations=args.checkpointed,
    )
    whole = DNAClassification(LABELS, config).to(device).train()
    part = copy.deepcopy(whole)
    part.split_length(split)

    def step(model: DNAClassification, length: int, together: bool) -> Callable[[], Tensor]:
        tokens = torch.randint(0, 4, (1, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        batch = tokens.to(device), torch.tensor([length], device=device)
        label = torch.tensor([1], device=device)

        def run() -> Tensor:
            """The gradients of all weights, one behind the other."""
            model.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(model(*batch), label)
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            if together:
                dist.all_reduce(gradients)
                gradients /= split.size
            return gradients

        return run

    steps: dict[str, dict[str, float]] = {}
    expected = None
    if split.rank == 0:
        steps["one process"], expected = _measure(step(whole, args.length, False), args.steps, device)
    split.all_reduce(torch.zeros(1, device=device))  # the others wait until here
    steps[f"1/{split.size} of it alone"], _ = _measure(
        step(whole, args.length // split.size, False), args.steps, device
    )
    del whole
    steps["split"], gradients = _measure(step(part, args.length, True), args.steps, device)
    if expected is None:
        return None
    one, all_of_them = steps["one process"], steps["split"]
    return {
        "length": args.length,
        "processes": split.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "steps": steps,
        "speedup": one["median_ms"] / all_of_them["median_ms"],
        "speedup_fastest": one["fastest_ms"] / all_of_them["fastest_ms"],
        "gradient_error": ((gradients - expected).norm() / expected.norm()).item(),
    }


def _measure(run: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """Times of single steps, each waited for, after three that do not count; the peak; the last gradients."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for i in range(steps + 3):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        gradients = run()
        if on_gpu:
            torch.cuda.synchronize(device)
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0
    return {"median_ms": statistics.median(times), "fastest_ms": min(times), "peak_gib": peak}, gradients


if __name__ == "__main__":
    main()
