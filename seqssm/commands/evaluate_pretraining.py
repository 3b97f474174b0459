"""Score pretraining on held-out DNA, in perplexity a base; `seqssm evaluate` calls it for such a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from seqssm.data.dna.sampling import UnlabelledBatch
from seqssm.data.dna.unlabelled import UnlabelledDNA
from seqssm.data.progress import progress_bar
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.base import Loaded, build_task, weights_of
from seqssm.tasks.evaluation import Resampler
from seqssm.tasks.markov import MarkovChain
from seqssm.tasks.pretraining import DNAPretraining


def evaluate_pretraining(
    loaded: Loaded,
    checkpoint: str,
    *,
    datamodule: Any,
    folder: Path | None,
    split: str,
    baselines: str,
    accelerator: str,
    seed: int,
    command: str,
) -> dict[str, Any]:
    """Perplexity of the model, and beside it of Markov chains fitted on the train windows, on the very same bases.

    Arguments are those of :func:`seqssm.commands.evaluate.evaluate`; ``baselines`` is ``all`` or ``none``. The chain
    always sees the bases before, never those behind, which a masked model sees, too.
    """
    if baselines not in ("all", "none"):
        raise UserError(f"--baselines {baselines}: beside pretraining stand Markov chains: all, or none")
    if not isinstance(datamodule, UnlabelledDNA):
        raise UserError(f"{checkpoint} was trained without labels: give data of the class UnlabelledDNA")
    task = build_task(loaded, DNAPretraining, checkpoint)
    cuda = accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    task = task.to("cuda" if cuda else "cpu")
    datamodule.prepare_data()
    datamodule.setup("fit")
    dataset = datamodule.grid(split)
    predictors: dict[str, MarkovChain] = {}
    if baselines == "all":
        predictors = _chains(datamodule)
    loader = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
    sums: dict[str, list[np.ndarray]] = {name: [] for name in ("model", *predictors)}
    counts: list[np.ndarray] = []
    with progress_bar(f"predicting {split} windows", len(dataset)) as advance:
        for number, batch in enumerate(loader):
            nll, where = _nll(task, UnlabelledBatch(*(t.to(task.device) for t in batch)), number, cuda)
            sums["model"].append(nll)
            counts.append(where.sum(1))
            for name, chain in predictors.items():
                rows = [np.nan_to_num(chain.nll(row)) for row in batch.tokens.numpy()]
                sums[name].append((np.stack(rows) * where).sum(1))
            advance(len(nll))
    resampler = Resampler({"record": dataset.windows.record}, seed=seed)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "command": command,
        "objective": task.objective,
        "split": split,
        "windows": len(dataset),
        "bases": int(np.concatenate(counts).sum()),
        "intervals": resampler.describe(),
        "perplexity": _intervals({k: np.concatenate(v) for k, v in sums.items()}, np.concatenate(counts), resampler),
        "uniform": 4.0,
    }
    report |= weights_of(loaded)
    text = _markdown(report, resampler.note)
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("metrics.json", json.dumps(report, indent=2) + "\n"), ("evaluation.md", text + "\n")):
            with atomic_write(folder / name) as file:
                file.write(content)
        print("wrote", folder / "metrics.json", folder / "evaluation.md")
    return report


def _chains(datamodule: UnlabelledDNA) -> dict[str, MarkovChain]:
    """By name: composition alone, and the order that validation prefers."""
    train, both = datamodule.grid("train"), datamodule.settings["rc_probability"] > 0
    best = MarkovChain(both_strands=both)
    with progress_bar("counting train windows", len(train)) as advance:
        best.fit((train[i].tokens for i in range(len(train))), advance)
    held_out = datamodule.grid("val") if datamodule.val is not None else train
    best.choose(held_out[i].tokens for i in range(len(held_out)))
    simplest = MarkovChain(0, both).fit(train[i].tokens for i in range(len(train)))
    return {"composition": simplest, f"Markov chain, order {best.order}": best}


@torch.inference_mode()
def _nll(task: DNAPretraining, batch: UnlabelledBatch, number: int, autocast: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each window (b,) the sum over its targets, and where they are (b, l)."""
    with torch.autocast(task.device.type, torch.bfloat16, autocast):
        prediction = task.predict(batch, torch.Generator(task.device).manual_seed(number))
    nll = torch.zeros(batch.tokens.shape, dtype=torch.float64, device=task.device)
    nll[prediction.where] = F.cross_entropy(prediction.logits, prediction.target, reduction="none").double()
    return nll.sum(1).cpu().numpy(), prediction.where.cpu().numpy()


def _intervals(sums: dict[str, np.ndarray], counts: np.ndarray, resampler: Resampler) -> dict[str, Any]:
    units = {k: np.bincount(resampler.unit, v, resampler.n_units) for k, v in {**sums, "": counts}.items()}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in sums}
    for weights in resampler.weights():
        for name, parts in samples.items():
            parts.append(np.exp(weights @ units[name] / (weights @ units[""])))
    result = {}
    for name, values in sums.items():
        low, high = resampler.interval(np.concatenate(samples[name]))
        result[name] = {"value": float(np.exp(values.sum() / counts.sum())), "low": low, "high": high}
    return result


def _markdown(report: dict[str, Any], note: str) -> str:
    lines = [
        f"{report['objective']}: {report['windows']:,} {report['split']} windows, {report['bases']:,} bases predicted",
        "",
        "| | perplexity a base | bits a base |",
        "|---|---|---|",
    ]
    for name, p in report["perplexity"].items():
        value = f"{p['value']:.4f} ({p['low']:.4f} to {p['high']:.4f})"
        lines.append(f"| {name} | {value} | {np.log2(p['value']):.4f} |")
    lines += ["| any base alike | 4 | 2 |", "", f"95% intervals over {report['intervals']['resampled']}s."]
    return "\n".join([*lines, note]) if note else "\n".join(lines)
