"""Model cards: README.md with the hub's YAML front matter, made of a checkpoint's other files and of nothing else.

Figures come from metrics.json as `seqssm evaluate` wrote it; what no program knows, such as licences, hardware and what
a model is not good for, comes from a short hand-written card.yaml.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from seqssm.errors import UserError

# Class -> what the hub calls such a task, and what people do.
_TASKS = {
    "DNAClassification": ("text-classification", "DNA classification", ["biology", "genomics", "dna"]),
    "DNAPretraining": ("fill-mask", "DNA pretraining", ["biology", "genomics", "dna"]),
    "AudioTagging": ("audio-classification", "audio tagging", ["audio", "audio-tagging"]),
    "StreamingASR": ("automatic-speech-recognition", "streaming speech recognition", ["audio", "speech", "streaming"]),
}
_USE = {
    "DNAClassification": ("seqssm classify GENOME.fa --checkpoint {name}", 'load("{name}").predict("ACGT...")'),
    "AudioTagging": ("seqssm tag RECORDING.wav --checkpoint {name}", 'load("{name}").predict("recording.wav")'),
    "StreamingASR": ("seqssm transcribe RECORDING.wav --checkpoint {name}", 'load("{name}").predict("recording.wav")'),
}
_TITLES = {"mcc": "MCC", "auroc": "AUROC", "macro_f1": "macro-F1", "map": "mAP", "mauc": "mAUC", "d_prime": "d'"}
_HUB_METRICS = {"mcc": "matthews_correlation", "macro_f1": "f1", "auroc": "roc_auc", "accuracy": "accuracy"}
_HUB_METRICS |= {"wer": "wer", "cer": "cer", "perplexity": "perplexity"}
MODEL = "model"
# What a list of checkpoints shows of one.
_MAIN = ("mcc", "wer", "map", "accuracy", "perplexity")


@dataclass(frozen=True)
class Source:
    """Data that a checkpoint was trained on.

    Args:
        name: of the data set.
        license: its own.
        url: where it is from.
        note: how much of it, and how it was changed.
    """

    name: str
    license: str
    url: str = ""
    note: str = ""


@dataclass(frozen=True)
class Notes:
    """The hand-written part of a card.

    Args:
        license: of the weights, as the hub spells it: ``apache-2.0``, ``cc-by-nc-4.0``.
        license_note: why, where the data ask for it.
        summary: what the model does, in a sentence or two.
        data: what it was trained on.
        split: what was held out, and how.
        commands: that trained it, exactly.
        hardware: that they ran on.
        time: that they took.
        tried: what else was tried, and how the choice was made.
        not_for: what it is not good for.
        language: of speech, as ISO 639-1.
        metric: the one that a list of checkpoints shows.
        default: whether commands use this checkpoint when none is named.
    """

    license: str = ""
    license_note: str = ""
    summary: str = ""
    data: list[Source] = field(default_factory=list)
    split: str = ""
    commands: list[str] = field(default_factory=list)
    hardware: str = ""
    time: str = ""
    tried: str = ""
    not_for: list[str] = field(default_factory=list)
    language: str = ""
    metric: str = ""
    default: bool = False

    @classmethod
    def parse(cls, text: str | None, name: str) -> Notes:
        """Read YAML; empty notes of None. Errors name the file ``name``.

        Raises:
            UserError: not YAML, an unknown key, or a value of another kind.
        """
        if text is None:
            return cls()
        import yaml

        try:
            content = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from error
        known = {one.name for one in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) - known:
            wrong = ", ".join(sorted(map(str, set(content) - known))) if isinstance(content, dict) else "a table"
            raise UserError(f"{name}: unknown key {wrong}; a card has {', '.join(sorted(known))}")
        try:
            content["data"] = [Source(**source) for source in content.get("data") or []]
        except TypeError as error:
            raise UserError(f"{name}: data must be a list of name, license, url and note ({error})") from error
        for one in dataclasses.fields(cls):
            kind = {"default": bool, "commands": list, "not_for": list, "data": list}.get(one.name, str)
            if one.name in content and not isinstance(content[one.name], kind):
                raise UserError(f"{name}: {one.name} must be a {kind.__name__}, not {content[one.name]!r}")
        return cls(**content)


@dataclass(frozen=True)
class Measure:
    """A figure with its interval; lower and upper end are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def text(self, signed: bool = False) -> str:
        """``0.841 [0.800, 0.881]``."""
        form = "+.3f" if signed else ".3f"
        interval = "" if self.low is None or self.high is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{interval}"


def measures(report: Mapping[str, Any]) -> dict[str, Measure]:
    """The model's scores in what `seqssm evaluate` wrote, by name; undefined ones are left out.

    Raises:
        UserError: it holds none.
    """
    found = _measures(report.get("metrics", {}))
    found |= _measures({key: report[key] for key in ("wer", "cer") if key in report})
    if MODEL in report.get("perplexity", {}):
        found |= _measures({"perplexity": report["perplexity"][MODEL]})
    if not found:
        raise UserError("metrics.json holds no scores; write it with `seqssm evaluate`")
    return found


def _baselines(report: Mapping[str, Any]) -> dict[str, dict[str, Measure]]:
    """What stands beside the model, by name."""
    found = {name: _measures(table) for name, table in report.get("baselines", {}).items()}
    others = {name: one for name, one in report.get("perplexity", {}).items() if name != MODEL}
    return found | {name: _measures({"perplexity": one}) for name, one in others.items()}


def _measures(table: Mapping[str, Any]) -> dict[str, Measure]:
    found = {}
    for name, one in table.items():
        value = one.get("value", one.get("rate")) if isinstance(one, Mapping) else one
        if isinstance(value, int | float):
            one = one if isinstance(one, Mapping) else {}
            found[name] = Measure(value, one.get("low"), one.get("high"), one.get("n", one.get("reference")))
    return found


def main_measure(report: Mapping[str, Any], notes: Notes) -> tuple[str, Measure]:
    """The score to show of a checkpoint, and its name."""
    found = measures(report)
    name = notes.metric or next((name for name in _MAIN if name in found), next(iter(found)))
    if name not in found:
        raise UserError(f"card.yaml: metric {name} is not in metrics.json, which has {', '.join(found)}")
    return title(name), found[name]


def title(measure: str) -> str:
    """What a measure is called in a table."""
    return _TITLES.get(measure, measure.upper() if measure in ("wer", "cer") else measure.replace("_", " "))


def task_title(config: Mapping[str, Any]) -> str:
    """What the task of a checkpoint is called."""
    cls = config["task"].rpartition(".")[2]
    return _TASKS[cls][1] if cls in _TASKS else cls


def model_card(
    name: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    reports: Mapping[str, Mapping[str, Any]],
    notes: Notes,
) -> str:
    """A README with YAML front matter: what a model is, how it scored beside the baselines, what it is not good for.

    Args:
        name: of the checkpoint.
        config: its config.json.
        weights: its state dict.
        reports: its evaluations by file name.
        notes: what was written by hand.
    """
    cls = config["task"].rpartition(".")[2]
    parameters = sum(v.numel() for v in weights.values())
    megabytes = sum(v.nbytes for v in weights.values()) / 1e6
    stored = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in weights.values() if v.is_floating_point()}))
    what = task_title(config)
    lines = [_front_matter(name, config, reports, notes), f"# {name}", ""]
    lines += [
        notes.summary.strip() or f"{what[0].upper()}{what[1:]}.",
        "",
        f"{parameters:,} weights, {megabytes:.2f} MB ({stored}), written by seqssm {config['version']}.",
    ]
    if config.get("storage"):
        storage = config["storage"]
        lines.append(
            f"Rounded to {storage['dtype']}: no probability of {storage['outputs']:,} on made-up input changed by more "
            f"than {storage['largest_change']:.1g}."
        )
    shell, python = _USE.get(cls, ("", "seqssm.hub.load_model(FOLDER)"))
    lines += ["", "## Use", "", *(["```", shell.format(name=name), "```", ""] if shell else [])]
    lines += ["```python", "from seqssm import load", "", python.format(name=name), "```"] if shell else [f"`{python}`"]
    if config.get("ngram"):
        about = config["ngram"]
        lines += [
            "",
            f"`--decode beam` searches with the n-gram model of {about['unit']}s that is beside the weights "
            f"(ngram.arpa.gz, weight {about['weight']:g}, bonus {about['bonus']:g}); `--ngram none` without.",
        ]
    for file, report in reports.items():
        lines += ["", *_results(file, report, config)]
    lines += _written("Not good for", [f"- {one}" for one in notes.not_for])
    data = [_source(one) for one in notes.data]
    lines += _written("Data", [*data, *(["", f"Split: {notes.split}"] if notes.split else [])])
    lines += _training(config, notes)
    if notes.license:
        note = f": {notes.license_note}" if notes.license_note else "."
        lines += _written("Licence", [f"Weights: {notes.license}{note}"])
    settings = json.dumps(config["init_args"], indent=2)
    return "\n".join([*lines, "", "## Settings", "", "```json", settings, "```", ""])


def _written(heading: str, lines: list[str]) -> list[str]:
    return ["", f"## {heading}", "", *lines] if lines else []


def _source(source: Source) -> str:
    name = f"[{source.name}]({source.url})" if source.url else source.name
    note = f": {source.note}" if source.note else ""
    return f"- {name}, licence {source.license}{note}"


def _training(config: Mapping[str, Any], notes: Notes) -> list[str]:
    lines = ["```", *notes.commands, "```"] if notes.commands else []
    facts = [f"hardware: {notes.hardware}"] if notes.hardware else []
    facts += [f"time: {notes.time}"] if notes.time else []
    facts += [f"{key.replace('_', ' ')}: {value}" for key, value in config.get("training", {}).items()]
    facts += [f"tried: {notes.tried}"] if notes.tried else []
    lines += ["", *(f"- {fact}" for fact in facts)] if facts else []
    if config.get("data"):
        lines += ["", "Data settings:", "", "```json", json.dumps(config["data"], indent=2), "```"]
    return _written("Training", lines)


def _results(file: str, report: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The tables of one evaluation."""
    what = file.removeprefix("metrics").removesuffix(".json").removeprefix("-")
    model, baselines = measures(report), _baselines(report)
    lines = [f"## Results{f': {what}' if what else ''}", ""]
    lines += _table(["", "model", *baselines], [
        [title(key), one.text(), *(table[key].text() if key in table else "n/a" for table in baselines.values())]
        for key, one in model.items()
    ])  # fmt: skip
    differences = {name: _measures(table) for name, table in report.get("differences", {}).items()}
    if differences:
        lines += ["", "Model minus baseline, paired over the same resamples:", ""]
        lines += _table(["", *differences], [
            [title(key), *(t[key].text(signed=True) if key in t else "n/a" for t in differences.values())]
            for key in model
        ])  # fmt: skip
    facts = []
    if "bootstrap" in report:
        one = report["bootstrap"]
        facts.append(
            f"[low, high]: {100 * one['confidence']:g}% intervals of {one['resamples']:,} bootstrap resamples of "
            f"{one['clusters']} {one['resampled']}s; {one['windows']} {report.get('item', 'window')}s"
        )
    facts += list(report.get("notes", []))
    if "utterances" in report:
        facts.append(
            f"{report['utterances']} utterances, {report['speakers']} speakers, {report['minutes']:.1f} minutes; "
            f"lookahead {report['lookahead_ms']} ms, decoding {report['decoding']}; [low, high]: 95% intervals"
        )
        for key, name in (("first_text_ms", "first text"), ("final_ms", "last result"), ("emission_delay_ms", "delay")):
            if report.get(key):
                facts.append(f"{name}: P50 {report[key]['p50']:.0f} ms, P90 {report[key]['p90']:.0f} ms")
        facts.append(f"real-time factor {report['real_time_factor']:.4f} on {report['device']}")
    facts += [f"`{report['command']}`"] if report.get("command") else []
    if config.get("storage"):
        same = report.get("weights_sha256") == config["sha256"]
        facts.append(
            f"These are the figures of the weights {'as they are here' if same else 'before they were rounded'}"
        )
    return [*lines, "", *(f"- {fact}" for fact in facts)]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:]]


def _front_matter(name: str, config: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]], notes: Notes) -> str:
    """As https://huggingface.co/docs/hub/model-cards describes it."""
    import yaml

    pipeline, _, topics = _TASKS.get(config["task"].rpartition(".")[2], ("other", "", []))
    front: dict[str, Any] = {"license": notes.license} if notes.license else {}
    front["library_name"] = "seqssm"
    front |= {"pipeline_tag": pipeline} if pipeline != "other" else {}
    front |= {"language": notes.language} if notes.language else {}
    front["tags"] = ["seqssm", "mamba", "state-space-model", *topics]
    front |= {"datasets": [source.name for source in notes.data]} if notes.data else {}
    found = {key: one for report in reports.values() for key, one in measures(report).items()}
    front |= {"metrics": [_HUB_METRICS[key] for key in found if key in _HUB_METRICS]} if found else {}
    results = [
        {
            "task": {"type": pipeline},
            "dataset": {
                "name": str((report.get("data") or {}).get("path", "") if isinstance(report.get("data"), Mapping)
                            else report.get("data", "")) or "unknown",
                "type": notes.data[0].name if notes.data else "unknown",
                "split": str(report.get("split") or (report.get("data") or {}).get("split", "test")),
            },
            "metrics": [
                {"type": _HUB_METRICS.get(key, key), "name": title(key), "value": round(one.value, 4)}
                for key, one in measures(report).items()
            ],
        }
        for report in reports.values()
    ]  # fmt: skip
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
