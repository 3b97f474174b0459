"""Checkpoints of all tasks: from Lightning to hub folders and back, rounded, started from, and asked."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

import seqssm
from seqssm import hub
from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.cli import main
from seqssm.data import DNABatch
from seqssm.data.features import FeatureConfig
from seqssm.data.speech.tokenizers import CharacterTokenizer
from seqssm.errors import UserError
from seqssm.hub import folders
from seqssm.mixers import Mixer
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.averaging import RunningAverage
from seqssm.tasks.base import Task, load_task, read_checkpoint
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.exporting import export, mean, to_lightning
from seqssm.tasks.network import load_network
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.tagging_network import TaggingNetwork

MAMBA = {"m": MixerSpec(class_path="Mamba", init_args={"d_state": 4})}
CAUSAL = BackboneConfig(d_model=16, n_layers=2, mixers=MAMBA)
TWO_WAY = BackboneConfig(d_model=16, n_layers=2, mixers=MAMBA, bidirectional="tied")
FEATURES = FeatureConfig(sample_rate=8000, n_mels=16, mean=-5.0, std=3.0)
RATE = 8000


def dna(**changes: object) -> DNAClassification:
    torch.manual_seed(0)
    arguments = {"labels": ["a", "b"], "backbone": TWO_WAY, "kmer": 2, "class_weights": "balanced", **changes}
    return DNAClassification(**arguments).eval()


def tagger(**changes: object) -> AudioTagging:
    torch.manual_seed(0)
    arguments = {"labels": ["x", "y", "z"], "features": FEATURES, "backbone": CAUSAL, "stem_channels": [4, 8, 8]}
    return AudioTagging(**{**arguments, "thresholds": [0.2, 0.3, 0.4], **changes}).eval()


def recogniser() -> StreamingASR:
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer("ab ").to_dict()
    return StreamingASR(tokenizer, features=FEATURES, backbone=CAUSAL, stem_channels=4).eval()


TASKS = {"dna": (dna, DNANetwork), "tagging": (tagger, TaggingNetwork), "asr": (recogniser, ASRNetwork)}


def lightning_checkpoint(task: Task, path: Path, **about: object) -> Path:
    description = {**task.describe(), "data": {"class_path": "X", "init_args": {"window_bp": 50}}, **about}
    torch.save({"state_dict": task.state_dict(), "seqssm": description}, path)
    return path


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def kind(request: pytest.FixtureRequest) -> tuple:
    return request.param


def test_all_ways_give_the_same_network(kind: tuple, tmp_path: Path) -> None:
    make, network = kind
    task = make()
    checkpoint = lightning_checkpoint(task, tmp_path / "x.ckpt", epochs=3)
    folder = export(checkpoint, tmp_path / "folder")
    back = to_lightning(folder, tmp_path / "back.ckpt")
    expected = task.probe()
    for source in (checkpoint, folder, back):
        loaded = load_network(source, network)
        assert type(loaded) is network
        assert not loaded.training
        torch.testing.assert_close(loaded.probe(), expected, rtol=0, atol=0)
        again = load_task(source, type(task))
        assert again.init_args() == task.init_args()
        assert read_checkpoint(source).description["epochs"] == 3
        assert loaded.trained_on == {"window_bp": 50}
        assert type(seqssm.load(source)) is network
    lightning = type(task).load_from_checkpoint(back, map_location="cpu").eval()
    torch.testing.assert_close(lightning.probe(), expected, rtol=0, atol=0)
    assert hub.read_config(folder)["network"]["class_path"].endswith(network.__name__)


def test_checkpoints_that_do_not_name_their_network_load_too(tmp_path: Path) -> None:
    task = dna()
    checkpoint = lightning_checkpoint(task, tmp_path / "old.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    del content["seqssm"]["network"]
    torch.save(content, checkpoint)
    assert isinstance(load_network(checkpoint, DNANetwork), DNAClassification)
    folder = export(checkpoint, tmp_path / "folder")
    assert type(load_network(folder, DNANetwork)) is DNANetwork
    training = hub.read_config(folder)["network"]["training_args"]
    assert sorted(training) == ["class_weights", "label_smoothing", "optimizer"]


class Windows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> DNABatch:
        tokens = torch.randint(4, (4, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        return DNABatch(tokens, torch.full((4,), 30), (tokens == 0).sum(1).gt(7).long())


def test_averaged_weights_are_exported_as_evaluation_uses_them(tmp_path: Path) -> None:
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="x")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RunningAverage(decay=0.9), checkpoint],
    )  # fmt: skip
    trainer.fit(dna(class_weights=None), DataLoader(Windows(), batch_size=None))
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    averaged, last = content["state_dict"], content["current_model_state"]
    _, weights = hub.load(export(tmp_path / "x.ckpt", tmp_path / "folder"))
    assert all(torch.equal(weights[key], averaged[key]) for key in averaged)
    assert not torch.equal(weights["head.1.weight"], last["head.1.weight"])


# ---- float16 -------------------------------------------------------------------------------------------------------


def test_half_precision_is_checked_and_said(kind: tuple, tmp_path: Path) -> None:
    make, network = kind
    task = make()
    checkpoint = lightning_checkpoint(task, tmp_path / "x.ckpt")
    whole, half = export(checkpoint, tmp_path / "whole"), export(checkpoint, tmp_path / "half", half=True)
    config, weights = hub.load(half)
    assert weights["head.weight" if "head.weight" in weights else "head.1.weight"].dtype == torch.float16
    kept = {key.rpartition(".")[2] for key, value in weights.items() if value.dtype == torch.float32}
    assert {"A_log", "D", "bias"} <= kept
    change = float((load_network(half, network).probe() - load_network(whole, network).probe()).abs().max())
    assert 0 < change < 1e-3
    assert config["storage"] == {
        "dtype": "float16",
        "largest_change": pytest.approx(change),
        "outputs": task.probe().numel(),
    }
    assert (half / hub.WEIGHTS).stat().st_size < 0.8 * (whole / hub.WEIGHTS).stat().st_size
    assert "Rounded to float16" in (half / hub.CARD).read_text()
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    with pytest.raises(UserError, match="float16 changes a probability"):
        export(checkpoint, half, half=True, tolerance=change / 2)
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before
    # Back in Lightning, weights are float32 again.
    content = torch.load(to_lightning(half, tmp_path / "back.ckpt"), weights_only=True)
    assert all(value.dtype != torch.float16 for value in content["state_dict"].values())


def test_weights_beyond_the_range_of_float16_are_refused(tmp_path: Path) -> None:
    task = dna()
    with torch.no_grad():
        task.head[1].weight.fill_(1e6)
    with pytest.raises(UserError, match="float16 changes"):
        export(lightning_checkpoint(task, tmp_path / "x.ckpt"), tmp_path / "folder", half=True)
    assert not (tmp_path / "folder").exists()


def test_the_mean_of_runs(tmp_path: Path) -> None:
    one, other = recogniser(), recogniser()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    paths = [lightning_checkpoint(task, tmp_path / f"{i}.ckpt") for i, task in enumerate((one, other))]
    made = load_network(mean(paths, tmp_path / "mean.ckpt"), ASRNetwork).state_dict()
    weights = one.state_dict(), other.state_dict()
    assert all(torch.allclose(made[key], (weights[0][key] + weights[1][key]) / 2) for key in made)
    with pytest.raises(UserError, match=r"t.ckpt is another model than .*0.ckpt"):
        mean([paths[0], lightning_checkpoint(tagger(), tmp_path / "t.ckpt")], tmp_path / "no.ckpt")
    spelled = StreamingASR(CharacterTokenizer("xy ").to_dict(), features=FEATURES, backbone=CAUSAL, stem_channels=4)
    with pytest.raises(UserError, match="has another tokenizer"):
        mean([paths[0], lightning_checkpoint(spelled, tmp_path / "s.ckpt")], tmp_path / "no.ckpt")
    assert not (tmp_path / "no.ckpt").exists()


def test_notes_stay_metrics_do_not_and_paths_lose_their_folders(tmp_path: Path) -> None:
    data = {"class_path": "X", "init_args": {"path": "/home/someone/secret/genomes.fa", "bed": ["~/a.bed", "b.bed"]}}
    data["init_args"]["cache_dir"] = "/home/someone/cache"  # its last part would be a folder where somebody else works
    checkpoint = lightning_checkpoint(dna(), tmp_path / "x.ckpt", data=data)
    metrics = {"metrics": {"accuracy": {"value": 0.5}}}
    folder = export(checkpoint, tmp_path / "f", notes="license: mit", metrics=metrics)
    assert export(checkpoint, folder) == folder
    assert (folder / hub.NOTES).read_text() == "license: mit"
    assert not (folder / hub.METRICS).exists()
    assert hub.read_config(folder)["data"]["init_args"] == {
        "path": "genomes.fa",
        "bed": ["a.bed", "b.bed"],
        "cache_dir": None,
    }


# ---- starting from one ---------------------------------------------------------------------------------------------


def test_init_from_says_what_it_takes_and_what_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("seqssm.tasks.base.rank_zero_info", told.append)
    folder = str(export(lightning_checkpoint(dna(), tmp_path / "x.ckpt"), tmp_path / "f"))
    source = dna()
    same = DNAClassification(["a", "b"], TWO_WAY, kmer=2, init_from=folder)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in same.state_dict().items())
    assert told[-1].startswith(f"init_from {folder}: {len(same.state_dict())} of {len(same.state_dict())} tensors")
    # Other classes, as many: the head would fit, and means something else.
    other = DNAClassification(["c", "d"], TWO_WAY, kmer=2, pooling="max", init_from=folder)
    assert torch.equal(other.embedding.bases.weight, source.embedding.bases.weight)
    assert not torch.equal(other.head[1].weight, source.head[1].weight)
    assert "new, at their random start (other labels): head.1.weight, head.1.bias" in told[-1]
    assert "in the checkpoint, not used: head.1.bias, head.1.weight" in told[-1]
    assert "pooling mean -> max" in told[-1]
    # One class of two is known, and stands elsewhere now.
    partly = DNAClassification(["b", "c", "d"], TWO_WAY, kmer=2, init_from=folder)
    assert torch.equal(partly.head[1].weight[0], source.head[1].weight[1])
    assert torch.equal(partly.head[1].bias[0], source.head[1].bias[1])
    assert not torch.equal(partly.head[1].weight[1], source.head[1].weight[0])
    assert "for 1 of 3 outputs, which both have: head.1.weight, head.1.bias" in told[-1]
    assert "random start" not in told[-1]
    with pytest.raises(UserError, match=r"weights do not fit this model, the first .*backbone.d_model 16 -> 32"):
        DNAClassification(["a", "b"], BackboneConfig(d_model=32, n_layers=2, mixers=MAMBA), init_from=folder)
    deeper = BackboneConfig(d_model=16, n_layers=3, mixers=MAMBA, bidirectional="tied")
    with pytest.raises(UserError, match=r"not there.*n_layers 2 -> 3"):
        DNAClassification(["a", "b"], deeper, kmer=2, init_from=folder)
    with pytest.raises(UserError, match=r"embedding.kmers.weight .*kmer 2 -> 3"):
        DNAClassification(["a", "b"], TWO_WAY, kmer=3, init_from=folder)
    with pytest.raises(UserError, match="no such checkpoint"):
        DNAClassification(["a", "b"], TWO_WAY, init_from="nowhere")


# ---- asking --------------------------------------------------------------------------------------------------------


def test_sequences_and_files_are_labelled(tmp_path: Path) -> None:
    folder = export(lightning_checkpoint(dna(), tmp_path / "x.ckpt"), tmp_path / "f")
    network = seqssm.load(folder)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ACGT"), 120))
    (tmp_path / "a.fa").write_text(f">one\n{text}\n>two\n{'N' * 60}\n")
    rows = network.predict(tmp_path / "a.fa")
    assert [(row.record, row.start_bp, row.end_bp) for row in rows] == [
        ("one", 0, 50), ("one", 50, 100), ("one", 70, 120), ("two", 0, 50), ("two", 10, 60),
    ]  # fmt: skip
    assert rows[-1].label is None
    assert rows[-1].probabilities is None
    assert network.predict(str(tmp_path / "a.fa")) == rows
    whole = network.predict(tmp_path / "a.fa", window_bp=0)
    assert [row.end_bp for row in whole] == [120, 60]
    alone = network.predict([text, text[:50].lower()])
    assert [(row.record, row.end_bp) for row in alone] == [("sequence 1", 120), ("sequence 2", 50)]
    assert alone[0].probabilities == pytest.approx(whole[0].probabilities, abs=1e-6)
    assert alone[1].probabilities == pytest.approx(rows[0].probabilities, abs=1e-6)
    assert network.predict(text) == network.predict([text])
    for bad, words in (
        ([""], "sequence 1 is empty"),
        (["AC", "A-C"], "sequence 2: '-'"),
        ("no/file.fa", "does not"),
        ("", "the sequence is empty"),
        (b"ACGT", "cannot read a bytes: give a sequence"),
        ({"name": "ACGT"}, "cannot read a dict"),  # its keys were taken for sequences
        (["ACGT", 3], "sequence 2 is no text but a int"),
    ):
        with pytest.raises(UserError, match=words):
            network.predict(bad)
    with pytest.raises(UserError, match="batch_size is 0: it must be at least 1"):  # answered nothing
        network.predict(text, batch_size=0)
    with pytest.raises(UserError, match="device 'gpu' cannot be used here"):
        seqssm.load(folder, "gpu")


def test_recordings_and_arrays_are_tagged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = export(lightning_checkpoint(tagger(), tmp_path / "x.ckpt"), tmp_path / "f")
    network = seqssm.load(folder)
    samples = (0.1 * np.random.default_rng(0).standard_normal(3 * RATE)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    tags = network.predict(tmp_path / "a.wav")
    assert tags.duration_s == 3.0
    assert sorted(tags.probabilities) == ["x", "y", "z"]
    assert tags.present == [
        name for name, p in tags.probabilities.items() if p >= network.thresholds["xyz".index(name)]
    ]
    wanting_gradients = torch.from_numpy(samples).requires_grad_()
    for array in (samples, torch.from_numpy(samples), wanting_gradients, np.stack([samples, samples])):
        assert network.predict(array, float(RATE)).probabilities == pytest.approx(tags.probabilities, abs=1e-6)
    # The command says the same.
    assert main(["tag", str(tmp_path / "a.wav"), "--checkpoint", str(folder), "--top-k", "3"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert {row[1]: float(row[2]) for row in rows} == pytest.approx(tags.probabilities, abs=1e-4)
    for bad, rate, words in (
        (samples, None, "need their sample rate"),
        (samples * np.nan, RATE, "NaN"),
        (np.zeros((2, 3, 4), np.float32), RATE, r"\(2, 3, 4\)"),
        (np.zeros(5, np.int64), RATE, "int64"),
        (tmp_path / "none.wav", None, "does not exist"),
        (samples[:, None], RATE, r"\(24000, 1\) have 24,000 channels: give \(channels, n\)"),  # as soundfile gives them
        (tmp_path / "a.wav", 8000, "says its own sample rate: leave rate out"),
        (samples, "16k", "a sample rate of '16k' is not a number"),
        ((tmp_path / "a.wav").read_bytes(), RATE, "not the bytes of a file"),
        ([[0.1, 0.2], [0.3]], RATE, "the samples are no array"),
    ):
        with pytest.raises(UserError, match=words):
            network.predict(bad, rate)


def test_recordings_and_arrays_are_written_down(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = export(lightning_checkpoint(recogniser(), tmp_path / "x.ckpt"), tmp_path / "f")
    network = seqssm.load(folder)
    samples = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    said = network.predict(tmp_path / "a.wav")
    assert said.text
    assert said.text == " ".join(segment.text for segment in said.segments)
    assert network.predict(samples, RATE).text == said.text
    assert main(["transcribe", str(tmp_path / "a.wav"), "--checkpoint", str(folder)]) == 0
    assert " ".join(capsys.readouterr().out.split("\n")[:-1]) == said.text


# ---- commands ------------------------------------------------------------------------------------------------------


def test_short_questions_are_answered_without_what_training_needs(tmp_path: Path) -> None:
    """Lightning and torchmetrics take longer to import than everything else together, Numba to compile."""
    for name, make, source in (("d", dna, "'ACGTACGT' * 9"), ("t", tagger, "[0.0, 0.1] * 8000, 8000")):
        folder = export(lightning_checkpoint(make(), tmp_path / f"{name}.ckpt"), tmp_path / name)
        code = f"""
import sys, seqssm
assert "torch" not in sys.modules
network = seqssm.load({str(folder)!r})
network.prepare_for(100)
network.predict({source})
print([name for name in ("lightning", "torchmetrics", "numba", "torch._dynamo", "scipy") if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout == "[]\n", done.stderr


def test_the_short_way_differs_by_rounding_alone(kind: tuple) -> None:
    task = kind[0]()
    task.prepare_for(10**9)
    compiled = task.probe()
    task.prepare_for(1)
    assert {module.backend for module in task.modules() if isinstance(module, Mixer)} == {"torch"}
    torch.testing.assert_close(task.probe(), compiled, rtol=0, atol=1e-5)


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err.strip().splitlines()[-1] if err.strip() else ""


def test_the_commands_list_export_import_and_card(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    monkeypatch.setattr(folders, "PRETRAINED", shelf)
    assert run(capsys, "checkpoints")[1] == "no checkpoints come with this version of seqssm\n"
    checkpoint = lightning_checkpoint(dna(), tmp_path / "x.ckpt")
    (tmp_path / "notes.yaml").write_text("license: apache-2.0\ndefault: true\n")
    report = {"metrics": {"accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}, "mcc": {"value": 0.7}}}
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    options = ["--half", "--notes", tmp_path / "notes.yaml", "--metrics", tmp_path / "metrics.json"]
    code, out, _ = run(capsys, "checkpoints", "export", checkpoint, shelf / "dna-small", *options)
    assert (code, out.startswith(f"wrote {shelf / 'dna-small'}")) == (0, True)
    assert "float16 changed no probability by more than" in out
    code, out, _ = run(capsys, "checkpoints", "--json")
    (row,) = json.loads(out)
    weights = sum(value.numel() for value in dna().state_dict().values())
    assert (row["name"], row["task"], row["parameters"]) == ("dna-small", "DNA classification", weights)
    assert (row["metric"], row["score"], row["license"], row["default"]) == ("MCC", "0.700", "apache-2.0", True)
    table = run(capsys, "checkpoints")[1]
    for cell in ("dna-small *", "DNA classification", f"{weights:,}", "MCC 0.700", "apache-2.0"):
        assert cell in table
    # By name, and by no name.
    (tmp_path / "a.fa").write_text(">one\nACGTACGTAAA\n")
    by_name = run(capsys, "classify", tmp_path / "a.fa", "--checkpoint", "dna-small")[1]
    assert by_name.startswith("record\t")
    assert run(capsys, "classify", tmp_path / "a.fa")[1] == by_name
    assert run(capsys, "checkpoints", "import", "dna-small", tmp_path / "back.ckpt")[0] == 0
    assert run(capsys, "classify", tmp_path / "a.fa", "--checkpoint", tmp_path / "back.ckpt")[1] == by_name
    # A card that says something else.
    assert run(capsys, "checkpoints", "card", "dna-small", "--check")[0] == 0
    card = shelf / "dna-small" / "README.md"
    card.write_text(card.read_text().replace("0.700", "0.990"))
    code, _, err = run(capsys, "checkpoints", "card", "dna-small", "--check")
    assert (code, "run seqssm checkpoints card" in err) == (2, True)
    assert run(capsys, "checkpoints", "card", "dna-small")[0] == 0
    assert run(capsys, "checkpoints", "card", "dna-small", "--check")[0] == 0


def test_bad_checkpoints_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PRETRAINED", tmp_path / "shelf")
    (tmp_path / "a.fa").write_text(">one\nACGT\n")
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), RATE)
    tags = export(lightning_checkpoint(tagger(), tmp_path / "t.ckpt"), tmp_path / "tags")
    labels = export(lightning_checkpoint(dna(), tmp_path / "d.ckpt"), tmp_path / "labels")
    broken = export(lightning_checkpoint(dna(), tmp_path / "d.ckpt"), tmp_path / "broken")
    (broken / hub.WEIGHTS).write_bytes((broken / hub.WEIGHTS).read_bytes()[:-9])
    for args, words in (
        (["classify", tmp_path / "a.fa", "--checkpoint", tags], "holds an audio tagger; this command needs a DNA"),
        (["classify", tmp_path / "a.fa", "--checkpoint", tmp_path / "t.ckpt"], "this command needs a DNA classifier"),
        (["tag", tmp_path / "a.wav", "--checkpoint", labels], "this command needs an audio tagger"),
        (["transcribe", tmp_path / "a.wav", "--checkpoint", tags], "this command needs a speech recogniser"),
        (["classify", tmp_path / "a.fa", "--checkpoint", broken], "is not the file that was saved"),
        (["classify", tmp_path / "a.fa"], "no DNA classifier is shipped: give --checkpoint"),
        (["tag", tmp_path / "a.wav"], "no audio tagger is shipped"),
        (["transcribe", tmp_path / "a.wav"], "no speech recogniser is shipped"),
        (["evaluate"], "which checkpoint? give --checkpoint"),
        (["evaluate", "--data", "dna/quickstart"], "no DNA classifier is shipped"),
        (["evaluate", "--data", "tagging/esc50"], "no audio tagger is shipped"),
        (["classify", tmp_path / "a.fa", "--checkpoint", "dna/../../x"], "cannot have .. in it"),
        (["checkpoints", "export", tags, tmp_path / "shelf" / "x", "--notes", "no.yaml"], "no.yaml cannot be read"),
        (["checkpoints", "import", tags, tmp_path / "no" / "x.ckpt"], "cannot write"),
        (["checkpoints", "drop"], "invalid choice"),
        (["hub", "pull", "a/../b", tmp_path / "x"], "not the name of a hub repository"),
        (["hub"], "required"),
    ):
        code, _, err = run(capsys, *args)
        assert (code, err.startswith("seqssm: error: ")) == (2, True)
        assert words in err
