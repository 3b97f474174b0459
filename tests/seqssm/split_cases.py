"""Runs in several processes, see test_parallel.py: compares split sequences with whole ones, in each process.

    python split_cases.py RANK SIZE RENDEZVOUS_FILE CASE...

over gloo on the CPU, or, for cases that begin with ``gpu/``, over NCCL on a GPU each:

prints a line for each case that passes, and a traceback for the first that does not.
"""

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig, MixerSpec
from seqssm.longcontext.parallel import LengthSplit, split_mixers
from seqssm.tasks.dna import DNAClassification

MIXERS = {
    "m": MixerSpec(class_path="Mamba", init_args={"d_state": 4}),
    "2": MixerSpec(class_path="Mamba2", init_args={"d_state": 4, "headdim": 8, "ngroups": 2}),
    "s": MixerSpec(class_path="S4D", init_args={"d_state": 4}),
}
BACKBONES = {
    f"{letter}-{name}": {"pattern": letter, **settings}
    for letter in MIXERS
    for name, settings in {
        "causal": {},
        "tied": {"bidirectional": "tied"},
        "untied": {"bidirectional": "untied"},
        "strands": {"bidirectional": "tied", "reverse_complement": True},
    }.items()
}
# In Triton's interpreter (float32): the layer as one function of autograd.
FUSED = {
    "m-causal": {"n_layers": 2},
    "m-recomputed": {"n_layers": 2, "checkpoint_activations": True},
    "m-tight": {"n_layers": 2, "checkpoint_activations": "tight"},
}
BACKBONES["mixed"] = {"pattern": "m2s", "mlp_ratio": 1.5, "checkpoint_activations": True, "bidirectional": "tied"}
# Over NCCL (float32, the Triton kernels): widths that the kernels are made for.
GPU_MIXERS = {
    "m": MixerSpec(class_path="Mamba"),
    "2": MixerSpec(class_path="Mamba2", init_args={"d_state": 64, "headdim": 32, "ngroups": 2}),
    "s": MixerSpec(class_path="S4D"),
}
ON_GPUS: dict[str, dict[str, object]] = {
    **FUSED,
    "m-tied": {"bidirectional": "tied"},
    "m-strands": {"bidirectional": "untied", "reverse_complement": True},
    "2-tied": {"pattern": "2", "bidirectional": "tied"},
    "s-tied": {"pattern": "s", "bidirectional": "tied"},
}
CLASSIFIERS = {
    "mean": {"kmer": 3, "motif": 5, "motif_layers": 1},
    "last": {"pooling": "last", "causal": True},
    "max-patch": {"pooling": "max", "patch": 4, "kmer": 5},
    "mean-max-bins": {"pooling": "mean_max", "pool_bins": 3},
    "strands": {"strands": True, "kmer": 3, "pool_bins": 2},
}


def compare(actual: Tensor, expected: Tensor, what: str) -> None:
    if expected.is_cuda:  # sums over thousands of tokens, in another order
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-4, f"{what}: relative error {error:.1e}"
        return
    rtol, atol = (1e-9, 1e-11) if expected.dtype == torch.float64 else (1e-4, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def compare_gradients(module: nn.Module, whole: nn.Module, scale: float) -> None:
    """The gradients of all processes, added up and multiplied by ``scale``, against those of one."""
    expected = dict(whole.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        total = parameter.grad.clone()
        dist.all_reduce(total)
        compare(total * scale, expected[name].grad, name)
        assert bool(expected[name].grad.any()), f"{name} has no gradient to compare"


def run_backbone(split: LengthSplit, settings: dict[str, object], packed: bool, backend: str, device: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "torch" else torch.float32
    sizes: dict[str, object] = {"d_model": 8, "n_layers": 3, "mixers": MIXERS, "backend": "torch"}
    length = 8 * split.size + 3  # does not share out evenly
    if device == "cuda":
        sizes |= {"d_model": 64, "mixers": GPU_MIXERS, "backend": backend}
        length = 1500 * split.size + 3
    whole = Backbone(BackboneConfig(**{**sizes, **settings})).to(device, dtype)
    x = torch.randn(2, length, whole.d_out, dtype=dtype, device=device)
    seq_idx = None
    if packed:
        # One row changes within parts and where two meet, the other nowhere.
        meeting = length // split.size
        seq_idx = torch.zeros(2, length, dtype=torch.int32, device=device)
        seq_idx[0, 3:5] = 1
        seq_idx[0, meeting:] = 2
        seq_idx[0, length - 2 :] = 0
    weights = torch.randn_like(x)
    part_model = copy.deepcopy(whole)
    for block in part_model.blocks:
        block.mixer.backend = backend
    split_mixers(part_model, split)
    start, end = split.bounds(length)

    x_whole = x.clone().requires_grad_()
    y = whole(x_whole, seq_idx=seq_idx)[0]
    (y * weights).sum().backward()
    x_part = x[:, start:end].clone().requires_grad_()
    y_part = part_model(x_part, seq_idx=None if seq_idx is None else seq_idx[:, start:end])[0]
    # Each process differentiates its share of one sum.
    (y_part * weights[:, start:end]).sum().backward()

    compare(y_part, y[:, start:end], "y")
    compare(x_part.grad, x_whole.grad[:, start:end], "dx")
    compare_gradients(part_model, whole, 1)
    with torch.no_grad():
        compare(part_model(x_part, seq_idx=None if seq_idx is None else seq_idx[:, start:end])[0], y_part, "no_grad")


def run_classifier(split: LengthSplit, name: str, ragged: bool) -> None:
    torch.manual_seed(0)
    settings = dict(CLASSIFIERS[name])
    config = BackboneConfig(
        d_model=8,
        n_layers=2,
        mixers=MIXERS,
        bidirectional="none" if settings.pop("causal", False) else "tied",
        reverse_complement=settings.pop("strands", False),
        backend="torch",
    )
    whole = DNAClassification(["a", "b", "c"], config, **settings).double()
    length = 47
    tokens = torch.randint(0, 5, (3, length), dtype=torch.uint8)
    lengths = torch.tensor([47, 30, 6] if ragged else [47, 47, 47])
    for row, real in zip(tokens, lengths.tolist(), strict=True):
        row[real:] = 5
    labels = torch.tensor([0, 2, 1])
    part_model = copy.deepcopy(whole)
    part_model.split_length(split)
    for model in (whole, part_model):
        torch.nn.functional.cross_entropy(model(tokens, lengths), labels).backward()
    with torch.no_grad():
        compare(part_model(tokens, lengths), whole(tokens, lengths), "logits")
        compare(part_model.predict_proba(tokens, lengths), whole.predict_proba(tokens, lengths), "probabilities")
    # As DDP has it: the same loss in all processes, and the mean of their gradients.
    compare_gradients(part_model, whole, 1 / split.size)


def main() -> None:
    rank, size, rendezvous, *cases = sys.argv[1:]
    device = "cuda" if cases[0].startswith("gpu/") else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    split = LengthSplit()
    for case in cases:
        kind, name, variant = case.split("/")
        if kind == "backbone":
            run_backbone(split, BACKBONES[name], variant == "packed", "torch", device)
        elif kind == "fused":
            run_backbone(split, FUSED[name], variant == "packed", "triton", device)
        elif kind == "gpu":
            run_backbone(split, ON_GPUS[name], variant == "packed", "triton", device)
        else:
            run_classifier(split, name, variant == "ragged")
        print("passed", case, flush=True)
    dist.destroy_process_group()  # or a thread of it may still run when the process ends


if __name__ == "__main__":
    main()
