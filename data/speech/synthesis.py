"""Synthetic speech: sentences spoken by programs that are installed beside this one, as a folder with a manifest.

More speech of the same kind for training alone: voices, speeds, pitches and levels are drawn for each sentence.
"""

from __future__ import annotations

import csv
import html
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqssm.data.audio.reading import read_audio
from seqssm.data.resampling import resample
from seqssm.errors import UserError

RATE_HZ = 16_000
SHORTEST_S = 0.25  # less is a program's failure to say anything
LONGEST_S = 120.0  # that a program may take for a sentence
VOICES = (
    *(f"flite:{name}" for name in ("kal16", "awb", "rms", "slt")),
    *(
        f"espeak-ng:{language}+{variant}"
        for language in ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland")
        for variant in ("m1", "m3", "m5", "m7", "f1", "f2", "f4", "f5")
    ),
)
"""English voices that both programs come with; those of each program are drawn equally often."""


@dataclass(frozen=True)
class Saying:
    """A sentence and how it is said.

    Args:
        text: words between spaces.
        program: that says it.
        voice: one of the program's.
        stretch: of the program's own duration.
        pitch: from 0 to 1, where the program has a choice.
        level: peak of the recording.
        pauses: between letters that are spelled.
    """

    text: str
    program: str
    voice: str
    stretch: float
    pitch: float
    level: float
    pauses: float


def _flite(saying: Saying, spell: bool, out: str) -> list[str]:
    rng = random.Random(saying.text)
    words = []
    for word in saying.text.lower().split():
        letter = spell and len(word) == 1 and word.isalpha()
        # "a" alone is read as the article.
        pause = "," if letter and rng.random() < saying.pauses else ""
        words.append(("ay" if letter and word == "a" else word) + pause)
    return [
        "flite", "-voice", saying.voice, "--setf", f"duration_stretch={saying.stretch:.3f}",
        "-t", " ".join(words), "-o", out,
    ]  # fmt: skip


def _espeak(saying: Saying, spell: bool, out: str) -> list[str]:
    words = []
    for word in saying.text.lower().split():
        written = html.escape(word)
        letter = spell and len(word) == 1 and word.isalpha()
        words.append(f'<say-as interpret-as="characters">{written}</say-as>' if letter else written)
    return [
        "espeak-ng", "-m", "-v", saying.voice, "-s", str(round(150 / saying.stretch)),
        "-p", str(round(20 + 60 * saying.pitch)), "-g", str(round(4 * saying.pauses)),
        "-w", out, f"<speak>{' '.join(words)}</speak>",
    ]  # fmt: skip


# saying, spell, path of the WAV -> the command line
PROGRAMS: dict[str, Callable[[Saying, bool, str], list[str]]] = {"flite": _flite, "espeak-ng": _espeak}


def plan_sayings(sentences: Sequence[str], voices: Sequence[str] = VOICES, seed: int = 0) -> list[Saying]:
    """Who says each sentence, and how.

    Args:
        sentences: words between spaces.
        voices: ``PROGRAM:VOICE`` each.
        seed: of all that is drawn.

    Raises:
        UserError: a voice is of no known program, or its program is not installed.
    """
    by_program: dict[str, list[str]] = {}
    for one in voices:
        program, _, voice = one.partition(":")
        if program not in PROGRAMS or not voice:
            raise UserError(f"{one!r} is no voice: give PROGRAM:VOICE, the program being {' or '.join(PROGRAMS)}")
        by_program.setdefault(program, []).append(voice)
    for program in by_program:
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not installed: install it (apt install {program}), or name the voices of another program"
            )
    rng, programs = random.Random(seed), list(by_program)
    sayings = []
    for sentence in sentences:
        program = rng.choice(programs)
        voice = rng.choice(by_program[program])
        sayings.append(
            Saying(
                sentence, program, voice,
                rng.uniform(0.8, 1.4), rng.random(), rng.uniform(0.2, 0.7), rng.random(),
            )
        )  # fmt: skip
    return sayings


def speak(saying: Saying, spell: bool = False) -> NDArray[np.float32]:
    """Samples (n,) at ``RATE_HZ`` of a sentence.

    Args:
        saying: the sentence.
        spell: words of one letter are the letters' names.

    Raises:
        UserError: the program fails, or says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "said.wav"
        command = PROGRAMS[saying.program](saying, spell, str(out))
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=LONGEST_S)
        except (subprocess.SubprocessError, OSError) as error:
            said = getattr(error, "stderr", None) or b""
            reason = said.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
            raise UserError(f"{saying.program} cannot say {saying.text!r} with {saying.voice}: {reason[0]}") from error
        if not out.is_file():
            raise UserError(f"{saying.program} cannot say {saying.text!r}: is there a voice {saying.voice}?")
        samples, rate = read_audio(out)
    said = resample(samples.mean(0), rate, RATE_HZ)
    peak = float(np.abs(said).max(initial=0.0))
    if len(said) < SHORTEST_S * RATE_HZ or not peak:
        raise UserError(f"{saying.program} says nothing for {saying.text!r} with {saying.voice}: leave one of them out")
    return said * np.float32(saying.level / peak)


def synthesise(
    sayings: Sequence[Saying],
    folder: Path,
    *,
    spell: bool = False,
    workers: int = 1,
    advance: Callable[[int], object] = lambda count: None,
    about: dict[str, object] | None = None,
) -> float:
    """Write a folder: ``manifest.tsv`` (path, text, speaker, split, seconds), recordings as Opus, ``synthesis.json``.

    Args:
        sayings: what is said; the split of all is train.
        folder: appears when it is whole; nothing may be there.
        spell: words of one letter are the letters' names.
        workers: programs that run at once.
        advance: is called with the number of sentences that were spoken since.
        about: more for ``synthesis.json``.

    Returns:
        Seconds of speech.

    Raises:
        UserError: the folder is there, the disk does not take it, or a sentence cannot be said.
    """
    import soundfile

    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or choose another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another --output") from error
    seconds = 0.0
    try:
        (temporary / "audio").mkdir()
        temporary.chmod(0o755)
        with (
            ThreadPoolExecutor(workers) as pool,
            open(temporary / "manifest.tsv", "w", encoding="utf-8", newline="") as file,
        ):
            table = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
            table.writerow(["path", "text", "speaker", "split", "seconds"])
            for number, samples in enumerate(pool.map(lambda one: speak(one, spell), sayings)):
                saying, name = sayings[number], f"audio/{number:06d}.ogg"
                soundfile.write(temporary / name, samples, RATE_HZ, format="OGG", subtype="OPUS")
                length_s = len(samples) / RATE_HZ
                speaker = f"{saying.program}-{saying.voice}"
                table.writerow([name, saying.text, speaker, "train", f"{length_s:.2f}"])
                seconds += length_s
                advance(1)
        plan = {**(about or {}), "spell": spell, "sayings": [asdict(saying) for saying in sayings]}
        (temporary / "synthesis.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another --output") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return seconds
