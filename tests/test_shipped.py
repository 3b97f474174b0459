"""The checkpoints inside the package: whole, small, licensed, and as good as their cards say."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import seqssm
from seqssm import hub
from seqssm.cli import find_config
from seqssm.tasks.network import Network

MOST_BYTES = 40_000_000
SHIPPED = hub.shipped()


def check_card(folder: Path) -> None:
    """Fails where a card says anything that its other files do not."""
    config, _ = hub.load(folder)
    notes = hub.read_notes(folder)
    assert notes.license, f"{folder.name}: card.yaml names no licence"
    assert all(source.license for source in notes.data), f"{folder.name}: data without a licence"
    assert notes.data, f"{folder.name}: card.yaml names no data"
    assert notes.not_for, f"{folder.name}: card.yaml does not say what the model is not good for"
    assert notes.commands, f"{folder.name}: card.yaml does not say how it was trained"
    assert hub.read_reports(folder), f"{folder.name}: no metrics.json"
    card = (folder / hub.CARD).read_text(encoding="utf-8")
    assert card == hub.make_card(folder), f"{folder.name}: run `seqssm checkpoints card {folder}`"
    for name, report in hub.read_reports(folder).items():
        evaluated = report.get("weights_sha256", config["sha256"])
        assert evaluated == config["sha256"], f"{folder.name}: {name} is about other weights"
    extra = [path.name for path in folder.iterdir() if not hub.folders.FILES.fullmatch(path.name)]
    assert not extra, f"{folder.name} holds {extra}"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_says_what_the_other_files_say(name: str) -> None:
    check_card(SHIPPED[name])


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads_and_answers(name: str) -> None:
    network = seqssm.load(name)
    assert isinstance(network, Network)
    answers = network.probe()
    assert torch.isfinite(answers).all()


def test_they_are_small_together() -> None:
    sizes = {path: path.stat().st_size for folder in SHIPPED.values() for path in folder.iterdir()}
    assert sum(sizes.values()) <= MOST_BYTES


def test_each_kind_has_one_default() -> None:
    kinds = {(hub.read_config(folder).get("network") or {}).get("class_path") for folder in SHIPPED.values()}
    for kind in kinds - {None}:
        assert hub.default(kind), f"several checkpoints of {kind}, and not one of them is marked `default: true`"


FINETUNING = {
    "asr/finetune": ("stem_channels", "lookahead_after"),
    "tagging/finetune": ("frame_group", "stem_channels", "stem_downsampling", "stem_depth", "pooling"),
    "dna/finetune": (),
}


@pytest.mark.parametrize("name", FINETUNING)
def test_configs_for_finetuning_are_shaped_as_their_checkpoint(name: str) -> None:
    asked = yaml.safe_load(Path(find_config(name)).read_text())["model"]["init_args"]
    shipped = hub.read_config(hub.resolve(asked["init_from"]))["init_args"]
    for key in FINETUNING[name]:
        assert asked[key] == shipped[key]
    for key in ("d_model", "n_layers"):
        assert asked["backbone"][key] == shipped["backbone"][key]


def test_the_check_of_cards_fails_where_it_should(tmp_path: Path) -> None:
    notes = "license: mit\ndata: [{name: x, license: mit}]\nnot_for: [y]\ncommands: [seqssm fit]\n"
    report = {"metrics": {"accuracy": {"value": 0.5}}}

    def write(notes: str = notes) -> Path:
        weights = {"w": torch.zeros(2)}
        return hub.save(tmp_path / "m", {"task": "seqssm.X", "init_args": {}}, weights, notes=notes, metrics=report)

    check_card(write())
    card = (tmp_path / "m" / hub.CARD).read_text()
    (tmp_path / "m" / hub.CARD).write_text(card.replace("| 0.500 |", "| 0.900 |"))
    with pytest.raises(AssertionError, match="run `seqssm checkpoints card"):
        check_card(tmp_path / "m")
    (write() / hub.METRICS).write_text(json.dumps({**report, "weights_sha256": "0"}))
    (tmp_path / "m" / hub.CARD).write_text(hub.make_card(tmp_path / "m"))
    with pytest.raises(AssertionError, match="about other weights"):
        check_card(tmp_path / "m")
    with pytest.raises(AssertionError, match="names no licence"):
        check_card(write(notes.replace("license: mit\n", "", 1)))
    (write() / "model.pkl").write_bytes(b"x")
    with pytest.raises(AssertionError, match=r"model\.pkl"):
        check_card(tmp_path / "m")
