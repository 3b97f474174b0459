import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from seqssm import hub
from seqssm.backbone import BackboneConfig, LanguageModel, MixerSpec
from seqssm.errors import UserError
from seqssm.hub import folders


def make() -> LanguageModel:
    torch.manual_seed(0)
    mixers = {"m": MixerSpec(class_path="Mamba"), "a": MixerSpec(class_path="Attention")}
    return LanguageModel(11, BackboneConfig(d_model=16, n_layers=2, mixers=mixers, pattern="ma")).eval()


def config_of(model: LanguageModel) -> dict:
    return {"task": "seqssm.backbone.LanguageModel", "init_args": model.init_args(), "data": {"class_path": "X"}}


@pytest.fixture
def saved(tmp_path):
    model = make()
    return hub.save(tmp_path / "model", config_of(model), model.state_dict())


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# ---- save and load -------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    model, tokens = make(), torch.randint(0, 11, (2, 9))
    metrics = {"metrics": {"accuracy": {"value": 0.91, "low": 0.88, "high": 0.93, "n": 200}, "mcc": {"value": 0.5}}}
    folder = hub.save(tmp_path / "new" / "model", config_of(model), model.state_dict(), metrics=metrics)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "metrics.json", "model.safetensors"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    config, weights = hub.load(folder)
    assert config["init_args"] == model.init_args()
    assert config["data"] == {"class_path": "X"}
    assert {k: v.tolist() for k, v in weights.items()} == {k: v.tolist() for k, v in model.state_dict().items()}
    loaded = hub.load_model(folder)
    assert not loaded.training
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "seqssm"
    assert "| accuracy | 0.910 [0.880, 0.930] |" in body
    assert "| MCC | 0.500 |" in body


def test_shared_and_strided_weights_are_kept(tmp_path):
    table = torch.randn(4, 6)
    weights = {"a": table, "b": table, "c": table.T, "d": table[:, ::2].bfloat16()}
    _, loaded = hub.load(hub.save(tmp_path / "m", {"task": "seqssm.X", "init_args": {}}, weights))
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())


def test_an_own_card_is_kept(tmp_path):
    folder = hub.save(tmp_path / "m", {"task": "seqssm.X", "init_args": {}}, {}, card="# Mine\n")
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_saving_again_replaces(saved, tmp_path):
    model = make()
    with torch.no_grad():
        model.embedding.weight.add_(1)
    hub.save(saved, config_of(model), model.state_dict())
    assert torch.equal(hub.load(saved)[1]["embedding.weight"], model.embedding.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_nothing_behind(saved, tmp_path):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(TypeError):
        hub.save(saved, {"task": "seqssm.X", "init_args": {"not plain": object()}}, {})
    with pytest.raises(ValueError, match="needs task and init_args"):
        hub.save(saved, {"task": "seqssm.X"}, {})
    with pytest.raises(ValueError, match="labels"):
        hub.save(saved, {"task": "seqssm.X", "init_args": {}, "labels": []}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("photos", "file"):
        with pytest.raises(UserError, match="not a checkpoint"):
            hub.save(tmp_path / name, {"task": "seqssm.X", "init_args": {}}, {})
    with pytest.raises(UserError, match="cannot write"):
        hub.save(tmp_path / "file" / "below", {"task": "seqssm.X", "init_args": {}}, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]


# ---- what is refused -----------------------------------------------------------------------------------------------


def tamper_weights(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["embedding.weight"][0, 0] += 1
    save_file(weights, path)


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def forge_garbage(folder):
    (folder / "model.safetensors").write_bytes(b"garbage")
    edit(folder, sha256=hashlib.sha256(b"garbage").hexdigest())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "No such file"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not the config"),
        (lambda f: edit(f, format_version=2), "format_version 2"),
        (lambda f: edit(f, run_me="code"), "unknown key run_me"),
        (lambda f: edit(f, sha256=None), "missing key sha256"),
        (lambda f: edit(f, init_args=[]), "init_args"),
        (lambda f: (f / "README.md").unlink(), "no model card"),
        (lambda f: edit(f, network={"class_path": "os.system"}), "training_args"),
        (lambda f: edit(f, network={"class_path": "os.system", "training_args": []}), "not one of seqssm's"),
        (tamper_weights, "not the file that was saved"),
        (truncate_weights, "not the file that was saved"),
        (forge_garbage, "not a safetensors file"),
        (lambda f: edit(f, task="os.system"), "not one of seqssm's"),
        (lambda f: edit(f, task="seqssm_other.Model"), "not one of seqssm's"),
        (lambda f: edit(f, task="seqssm.hub.save"), "not a model"),
        (lambda f: edit(f, task="seqssm.hub.shutil.rmtree"), "unknown to seqssm"),
        (lambda f: edit(f, task="seqssm.tasks.NoSuchTask"), "unknown to seqssm"),
        (lambda f: edit(f, init_args={**make().init_args(), "width": 3}), "width"),
        (lambda f: edit(f, init_args={**make().init_args(), "vocab_size": 12}), "do not fit"),
        (
            lambda f: edit(f, init_args={**make().init_args(), "vocab_size": 10**15}),
            "init_args do not fit .*was it edited",
        ),
        (lambda f: edit(f, init_args={**make().init_args(), "vocab_size": -1}), "init_args do not fit .*was it edited"),
        (
            lambda f: edit(f, init_args={**make().init_args(), "config": {"mixers": {"m": {"class_path": "a.B"}}}}),
            "a.B",
        ),
        (lambda f: edit(f, init_args={**make().init_args(), "config": {"depth": 1}}), "depth"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(saved, damage, words):
    damage(saved)
    with pytest.raises(UserError, match=words) as caught:
        hub.load_model(saved)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_and_the_old_checkpoint_stays(saved, tmp_path):
    """No file of the process may grow past 4 KiB: the weights do not fit, and the system says so."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    code = """
import resource, sys, torch
from seqssm import hub
from seqssm.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    hub.save(sys.argv[1], {"task": "seqssm.X", "init_args": {}}, {"w": torch.zeros(10_000)})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write the checkpoint {saved}: File too large; choose another place\n"
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


NOTES = """
license: cc-by-nc-4.0
summary: A test.
data: [{name: clips, license: CC-BY-NC-3.0}]
not_for: [anything]
default: true
"""


def test_cards_are_made_of_the_other_files(tmp_path):
    model = make()
    metrics = {
        "metrics": {"accuracy": {"value": 0.91, "low": 0.88, "high": 0.93, "n": 200}},
        "baselines": {"majority": {"accuracy": {"value": 0.5, "low": 0.5, "high": 0.5, "n": 200}}},
        "differences": {"majority": {"accuracy": {"value": 0.41, "low": 0.38, "high": 0.43, "n": 200}}},
        "command": "seqssm evaluate",
        "data": {"path": "clips", "split": "test"},
    }
    folder = hub.save(tmp_path / "m", config_of(model), model.state_dict(), metrics=metrics, notes=NOTES)
    card = (folder / "README.md").read_text()
    assert card == hub.make_card(folder)
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "cc-by-nc-4.0"
    assert front["datasets"] == ["clips"]
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": 0.91}]
    assert "| accuracy | 0.910 [0.880, 0.930] | 0.500 [0.500, 0.500] |" in body
    assert "| accuracy | +0.410 [+0.380, +0.430] |" in body
    assert "- clips, licence CC-BY-NC-3.0" in body
    assert "## Not good for\n\n- anything\n" in body
    metrics["metrics"]["accuracy"]["value"] = 0.92
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert hub.make_card(folder) == card.replace("0.910 [", "0.920 [").replace("value: 0.91\n", "value: 0.92\n")
    longer = {**metrics, "metrics": {"accuracy": {"value": 0.7}}}
    (folder / "metrics-2^20.json").write_text(json.dumps(longer))
    assert "## Results: 2^20\n\n|  | model | majority |\n|---|---|---|\n| accuracy | 0.700 |" in hub.make_card(folder)


def test_cards_of_speech_and_pretraining(tmp_path):
    """Reports of other forms: error rates are not called values, and perplexities hold their own baselines."""
    rate = {"rate": 0.05, "low": 0.04, "high": 0.06, "reference": 773}
    speech = {
        "wer": rate,
        "cer": {**rate, "rate": 0.02},
        "utterances": 130,
        "speakers": 10,
        "minutes": 6.0,
        "lookahead_ms": 320,
        "decoding": "greedy",
        "first_text_ms": {"p50": 300.0, "p90": 400.0},
        "real_time_factor": 0.01,
        "device": "cpu",
        "data": "an4",
        "split": "test",
    }
    perplexity = {"model": {"value": 3.2, "low": 3.1, "high": 3.3}, "Markov chain, order 9": {"value": 3.6}}
    config = config_of(make())
    card = (hub.save(tmp_path / "s", config, {}, metrics=speech) / "README.md").read_text()
    assert "| WER | 0.050 [0.040, 0.060] |" in card
    assert "first text: P50 300 ms, P90 400 ms" in card
    folder = hub.save(tmp_path / "p", config, {}, metrics={"perplexity": perplexity, "split": "test"})
    card = (folder / "README.md").read_text()
    assert "|  | model | Markov chain, order 9 |" in card
    assert "| perplexity | 3.200 [3.100, 3.300] | 3.600 |" in card


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("license: [", "not YAML"),
        ("licence: mit", "unknown key licence"),
        ("- a", "unknown key a table"),
        ("data: [{title: x}]", "data must be a list"),
        ("data: [{name: x}]", "license"),
        ("default: 3", "default must be a bool"),
        ("not_for: speech", "not_for must be a list"),
    ],
)
def test_notes_are_checked(text, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        hub.save(tmp_path / "m", {"task": "seqssm.X", "init_args": {}}, {}, notes=text)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_metrics_that_hold_no_scores_are_refused(saved):
    (saved / "metrics.json").write_text('{"metrics": {}}')
    with pytest.raises(UserError, match="no scores"):
        hub.make_card(saved)


def test_the_default_is_marked_or_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PRETRAINED", tmp_path)
    model, path = make(), "seqssm.backbone.LanguageModel"
    config = {**config_of(model), "network": {"class_path": path, "training_args": []}}
    assert hub.default(path) is None
    hub.save(tmp_path / "one", config, model.state_dict())
    assert hub.default(path) == "one"
    hub.save(tmp_path / "two", config, model.state_dict())
    assert hub.default(path) is None
    hub.save(tmp_path / "three", config, model.state_dict(), notes="default: true")
    assert hub.default(path) == "three"
    assert hub.default("seqssm.X") is None


def test_names_resolve(saved, tmp_path, monkeypatch):
    assert hub.resolve(saved) == saved
    with pytest.raises(UserError, match="no such checkpoint"):
        hub.resolve("dna-nothing")
    with pytest.raises(UserError, match=r"cannot have \.\. in it"):
        hub.resolve("dna/../../etc")
    monkeypatch.setattr(folders, "PRETRAINED", tmp_path / "pretrained")
    hub.save(tmp_path / "pretrained" / "dna-small", config_of(make()), make().state_dict())
    assert hub.shipped() == {"dna-small": tmp_path / "pretrained" / "dna-small"}
    assert hub.resolve("dna-small") == tmp_path / "pretrained" / "dna-small"
    # A folder of data that is called like a shipped checkpoint does not stand in its way; a checkpoint there does.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dna-small").mkdir()
    assert hub.resolve("dna-small") == tmp_path / "pretrained" / "dna-small"
    (tmp_path / "dna-small" / "config.json").write_text("{}")
    assert hub.resolve("dna-small") == Path("dna-small")
    with pytest.raises(UserError, match="the name of the checkpoint is empty"):
        hub.resolve("")


# ---- weights from transformers -------------------------------------------------------------------------------------


def foreign(kind: str, **settings: object):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, **settings}
    if kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        sizes = {"head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 8, **sizes}
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that start at zero or one must matter too
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {}),
        ("mamba", {"use_bias": True, "use_conv_bias": False, "expand": 3, "tie_word_embeddings": False}),
        ("mamba2", {}),
        ("mamba2", {"use_bias": True, "n_groups": 1, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3}),
    ],
)
@torch.no_grad()
def test_transformers_weights_give_the_same_logits(kind, settings, tmp_path):
    theirs = foreign(kind, **settings)
    tokens = torch.randint(0, 31, (2, 19))
    expected = theirs(tokens).logits
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    for source in (tmp_path, (theirs.config.to_dict(), theirs.state_dict())):
        ours = hub.from_transformers(source)
        assert (ours(tokens)[0] - expected).abs().max() < 1e-4
    state = ours.init_state(2)
    steps = torch.stack([ours.step(token, state) for token in tokens.unbind(1)], 1)
    assert (steps - expected).abs().max() < 1e-4
    head, state = ours(tokens[:, :11])
    tail, _ = ours(tokens[:, 11:], state)
    assert (torch.cat([head, tail], 1) - expected).abs().max() < 1e-4


def test_what_cannot_be_mapped_is_named(tmp_path):
    model = foreign("mamba2")
    config, weights = model.config.to_dict(), model.state_dict()
    for change, words in [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"num_hidden_layers": 4}, "do not fit"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            hub.from_transformers(({**config, **change}, weights))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a readable"):
        hub.from_transformers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="pickled weights"):
        hub.from_transformers(tmp_path)
