"""Score a recogniser on held-out speech as it would be used, packet by packet; `seqssm evaluate` calls it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from seqssm.cli import config_section, names_data
from seqssm.commands.transcribe import decoding_config, set_threads
from seqssm.data.progress import progress_bar
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_decoding import DecodingConfig, decoders
from seqssm.tasks.asr_evaluation import (
    LongStream,
    Scores,
    emission_delays,
    forced_word_times,
    hear,
    score_long_stream,
)
from seqssm.tasks.asr_load import simulate_sessions
from seqssm.tasks.asr_stream import SlotTable, Transcriber
from seqssm.tasks.base import Loaded, build_task, class_path, load_task, weights_of


def is_asr(loaded: Loaded) -> bool:
    """Whether a checkpoint holds a recogniser."""
    return loaded.description["task"] == class_path(StreamingASR)


def run(loaded: Loaded, args: argparse.Namespace) -> None:
    """`seqssm evaluate` of a recogniser."""
    set_threads(args)
    evaluate_asr(
        args.checkpoint,
        loaded,
        datamodule=speech_data(loaded, args.data),
        folder=args.output,
        split=args.split,
        device=args.device,
        seed=args.seed,
        command=args.command_line,
        lookahead_ms=args.lookahead_ms,
        chunk_ms=args.chunk_ms,
        decoding=decoding_config(args),
        packet_ms=args.packet_ms,
        packets=_numbers("--packets", args.packets, int) if args.packets else [],
        aligner=args.aligner,
        stream_minutes=args.stream_minutes,
        stretch_minutes=args.stretch_minutes,
        gap_s=_gap(args.gap_s),
        sessions=args.sessions,
        sessions_s=args.sessions_s,
    )


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{name} {text}: give numbers with commas between them") from error
    if min(numbers) < (1 if kind is int else 0):
        raise UserError(f"{name} {text}: they must be positive")
    return numbers


def _gap(text: str) -> tuple[float, float]:
    low, high, *more = [*_numbers("--gap-s", text, float), -1.0, -1.0][:3]
    if high < low or more[0] != -1:
        raise UserError(f"--gap-s {text}: give the least and the greatest gap, such as 0.5,2")
    return low, high


def speech_data(loaded: Loaded, data: str | None) -> Any:
    """Data to score a checkpoint on, in its own written form, tokens and features.

    Args:
        loaded: the checkpoint.
        data: a config with a `data` section, or a manifest or folder as SpeechDataModule's `path`; the training data
            by default. Of its `text`, `unknown` alone counts: `remove` scores what the model can spell.
    """
    from seqssm.data.speech.datamodule import SpeechDataModule

    if data is None or names_data(data):
        settings = dict(loaded.data.get("init_args", {}))
        if data is not None:
            settings = {"path": data, "cache_dir": settings.get("cache_dir")}
    else:
        settings = dict(config_section(data, "data", "--data").get("init_args", {}))
    if "path" not in settings:
        raise UserError(
            "there is no data to score on: give --data a manifest, a folder or a config with a data section"
        )
    stored = loaded.description["init_args"]
    unknown = {key: value for key, value in (settings.get("text") or {}).items() if key == "unknown"}
    # The statistics, too: what the model was trained on, not what other data would give.
    settings |= {"features": stored["features"], "text": {**stored["text"], **unknown}}
    settings |= {"tokenizer": {"stored": stored["tokenizer"]}}
    try:
        return SpeechDataModule(**settings)
    except TypeError as error:
        raise UserError(f"the data section does not fit SpeechDataModule: {error}") from error


def evaluate_asr(
    checkpoint: str,
    loaded: Loaded,
    *,
    datamodule: Any,
    folder: Path | None = None,
    split: str = "test",
    device: str = "auto",
    seed: int = 0,
    command: str = "",
    lookahead_ms: int | None = None,
    chunk_ms: float = 160.0,
    decoding: DecodingConfig | None = None,
    packet_ms: float = 100.0,
    packets: list[int] | None = None,
    aligner: str | None = None,
    stream_minutes: float | None = None,
    stretch_minutes: float = 10.0,
    gap_s: tuple[float, float] = (0.5, 2.0),
    sessions: int | None = None,
    sessions_s: float = 30.0,
) -> dict[str, Any]:
    """Stream a split through a recogniser, print the report, and write it.

    Args:
        checkpoint: its name, for the report.
        loaded: what it holds.
        datamodule: a SpeechDataModule.
        folder: where ``metrics.json``, ``evaluation.md`` and ``transcripts.tsv`` go; None writes nothing.
        split: ``test`` or ``val``.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: of the bootstrap and the long stream.
        command: what the user typed.
        lookahead_ms, chunk_ms: as of the :class:`Transcriber`.
        decoding: the search.
        packet_ms: what arrives at once.
        packets: sizes in samples that are to give the same bytes.
        aligner: a checkpoint for the forced alignment; the one that is scored by default.
        stream_minutes, stretch_minutes, gap_s: of the long stream; None for none.
        sessions, sessions_s: clients at once, and seconds that each speaks; None for none.
    """
    if device in ("auto", "gpu"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    task = build_task(loaded, StreamingASR, checkpoint).to(device)
    lookahead_ms = task.lookahead_ms[task.eval_choice] if lookahead_ms is None else lookahead_ms
    lookahead = task.lookahead_ms[task.menu_position(lookahead_ms)]
    judge = task if aligner is None else load_task(aligner, StreamingASR).to(device)
    decoding = decoding or DecodingConfig()
    make_decoder = decoders(task, decoding)
    rate = task.features.sample_rate
    packet = max(1, round(packet_ms / 1000 * rate))

    def transcriber() -> Transcriber:
        return Transcriber(task, rate, lookahead_ms=lookahead, chunk_ms=chunk_ms, decoder=make_decoder())

    utterances = datamodule.utterances(split)
    scores, different = Scores(), dict.fromkeys(packets or [], 0)
    transcriber().accept(datamodule.samples(split, 0))  # compiles what is compiled on first use
    with progress_bar(split, len(utterances)) as advance:
        for i, utterance in enumerate(utterances):
            samples = datamodule.samples(split, i)
            heard = hear(transcriber(), samples, packet)
            times = forced_word_times(judge, samples, utterance.text)
            scores.references.append(utterance.text)
            scores.heard.append(heard)
            if heard.first_s is not None and times:
                scores.first_latencies.append(heard.first_s - times[0][0])
            scores.delays += emission_delays(heard, utterance.text, times, lookahead / 1000, task.token_s)
            for size in different:
                different[size] += hear(transcriber(), samples, size).to_bytes() != heard.to_bytes()
            advance(1)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "command": command,
        "split": split,
        "data": str(datamodule.settings["path"]),
        "parameters": sum(p.numel() for p in task.parameters()),
        "lookahead_ms": lookahead,
        "chunk_ms": 1000 * transcriber().table.chunk * task.token_s,
        "state_bytes": transcriber().table.state_bytes,
        "decoding": decoding.describe(),
        "aligner": aligner or checkpoint,
        "device": device,
        "threads": torch.get_num_threads(),
        **weights_of(loaded),
        **scores.summary([one.speaker for one in utterances], seed),
    }
    if different:
        report["packets_with_other_bytes"] = {str(size): count for size, count in different.items()}
    if stream_minutes is not None:
        plan = LongStream.plan([one.seconds for one in scores.heard], stream_minutes, gap_s, seed)
        with progress_bar(f"{stream_minutes:g} minutes", len(plan.order)) as advance:
            report["long_stream"] = score_long_stream(
                transcriber(),
                plan,
                lambda i: datamodule.samples(split, i),
                scores.references,
                [one.text for one in scores.heard],
                stretch_minutes=stretch_minutes,
                seed=seed,
                advance=advance,
            )
    if sessions is not None:
        table = SlotTable(task, sessions, chunk_ms)
        sounds = [datamodule.samples(split, i) for i in range(min(len(utterances), 100))]
        clients: dict[str, Any] = {"packet_ms": packet_ms, "lookahead_ms": lookahead, "seed": seed}
        simulate_sessions(table, sounds, rate, seconds=2 * chunk_ms / 1000, **clients)  # compiles
        report["live_sessions"] = simulate_sessions(table, sounds, rate, seconds=sessions_s, **clients)
    text = to_markdown(report)
    print(text)
    if folder is not None:
        _save(folder, report, text, scores, [one.name for one in utterances])
    return report


def _save(folder: Path, report: dict[str, Any], text: str, scores: Scores, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "metrics.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    with atomic_write(folder / "evaluation.md") as file:
        file.write(text + "\n")
    with atomic_write(folder / "transcripts.tsv") as file:
        file.write("name\treference\thypothesis\n")
        for name, reference, heard in zip(names, scores.references, scores.heard, strict=True):
            file.write(f"{name}\t{reference}\t{heard.text}\n")
    print(f"wrote {folder}/metrics.json, evaluation.md and transcripts.tsv")


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"# {report['checkpoint']} on {report['split']} of {report['data']}",
        "",
        f"{report['utterances']} utterances, {report['speakers']} speakers, {report['minutes']:.1f} minutes. "
        f"{report['parameters'] / 1e6:.2f} M parameters, lookahead {report['lookahead_ms']} ms, chunks of "
        f"{report['chunk_ms']:g} ms, {report['state_bytes']:,} bytes of state, decoding {report['decoding']}, "
        f"{report['device']}, {report['threads']} threads.",
        "",
        "| | rate | 95% interval | by speaker | substitutions | insertions | deletions | of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("wer", "cer"):
        one = report[name]
        by_speaker = f"{one['low_by_speaker']:.2%} to {one['high_by_speaker']:.2%}" if "low_by_speaker" in one else "-"
        lines.append(
            f"| {name.upper()} | {one['rate']:.2%} | {one['low']:.2%} to {one['high']:.2%} | {by_speaker} | "
            f"{one['substitutions']} | {one['insertions']} | {one['deletions']} | {one['reference']} |"
        )
    lines += ["", f"{report['exact_utterances']} utterances without an error.", "", "| | P50 | P90 |", "|---|---|---|"]
    for key, name in (
        ("first_text_ms", "first text behind the first word's start, ms"),
        ("final_ms", "last result behind the end of the sound, ms"),
        ("emission_delay_ms", "a word's last token behind the word's end, lookahead included, ms"),
    ):
        one = report[key]
        lines.append(f"| {name} | " + (f"{one['p50']:.0f} | {one['p90']:.0f} |" if one else "- | - |"))
    lines += [
        "",
        f"Real-time factor {report['real_time_factor']:.4f}; words revised after they were shown: "
        f"{report['revised_words_ratio']:.4f} of all. Word times are those of a forced alignment by "
        f"{report['aligner']}.",
    ]
    if "packets_with_other_bytes" in report:
        lines += ["", "| packets of | recordings with other bytes |", "|---|---|"]
        for size, count in report["packets_with_other_bytes"].items():
            lines.append(f"| {int(size):,} samples | {count} of {report['utterances']} |")
    if "long_stream" in report:
        one = report["long_stream"]
        stretches = ", ".join(f"{rate:.2%}" for rate in one["wer_by_stretch"])
        lines += [
            "",
            f"One stream of {one['minutes']:.1f} minutes, {one['utterances']} utterances with gaps: WER "
            f"{one['wer']['rate']:.2%} ({one['difference_points']:+.2f} points against the same utterances one by "
            f"one); by {one['stretch_minutes']:g} minutes: {stretches}. Snapshot: {one['snapshot_bytes']['first']:,} "
            f"bytes at first, {one['snapshot_bytes']['largest']:,} at most. Real-time factor "
            f"{one['real_time_factor']:.4f}.",
        ]
    if "live_sessions" in report:
        one = report["live_sessions"]
        latency = one["latency_ms"]
        lines += [
            "",
            f"{one['sessions']} live sessions at once for {one['seconds']:g} s, packets of {one['packet_ms']:g} ms: "
            f"latency beyond the lookahead P50 {latency['p50']:.0f}, P90 {latency['p90']:.0f}, P99 "
            f"{latency['p99']:.0f}, largest {latency['max']:.0f} ms; a step takes {one['step_ms']:.1f} ms, one thread "
            f"is busy {one['busy']:.0%} of the time.",
        ]
    if report["command"]:
        lines += ["", f"`{report['command']}`"]
    return "\n".join(lines)
