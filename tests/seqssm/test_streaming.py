import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from seqssm import hub
from seqssm.backbone import Backbone, BackboneConfig, LanguageModel, MixerSpec
from seqssm.errors import UserError
from seqssm.streaming import Stream, fingerprint

MIXERS = {
    "m": MixerSpec(class_path="Mamba", init_args={"d_state": 4}),
    "2": MixerSpec(class_path="Mamba2", init_args={"d_state": 4, "headdim": 8}),
    "s": MixerSpec(class_path="S4D", init_args={"d_state": 4}),
    "a": MixerSpec(class_path="Attention", init_args={"heads": 2}),
    "w": MixerSpec(class_path="Attention", init_args={"heads": 2, "window": 6}),
}
CONFIG = BackboneConfig(d_model=16, n_layers=5, mixers=MIXERS, pattern="m2saw")


def make(seed: int = 0, config: BackboneConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(11, config).eval()


def tokens(length: int = 61) -> Tensor:
    return torch.randint(0, 11, (1, length), generator=torch.Generator().manual_seed(1))


def run(stream: Stream, x: Tensor, sizes: list[int]) -> Tensor:
    outputs = [y for packet in x.split(sizes, 1) for y in stream.advance(packet)]
    return torch.cat(outputs + stream.flush(), 1)


@pytest.mark.parametrize("chunk", [1, 7])
def test_packets_of_any_size_give_equal_bytes(chunk):
    model, x = make(), tokens()
    whole = run(Stream(model, chunk), x, [61])
    torch.testing.assert_close(whole, model(x)[0], rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        sizes: list[int] = []
        while sum(sizes) < 61:
            sizes.append(min(61 - sum(sizes), int(torch.randint(0, 20, (1,), generator=generator))))
        assert torch.equal(run(Stream(model, chunk), x, sizes), whole)
    assert torch.equal(run(Stream(model, chunk), x, [1] * 61), whole)


def test_features_and_batches():
    torch.manual_seed(0)
    backbone = Backbone(CONFIG).eval()
    x = torch.randn(3, 20, 16)
    stream = Stream(backbone, 8, batch=3)
    assert stream.advance(x[:, :3]) == []
    assert stream.position == 0
    outputs = stream.advance(x[:, 3:])
    assert [y.shape[1] for y in outputs] == [8, 8]
    assert stream.position == 16
    torch.testing.assert_close(torch.cat(outputs + stream.flush(), 1), backbone(x)[0], rtol=1e-4, atol=1e-4)
    assert stream.position == 20
    stream.reset()
    assert torch.equal(torch.cat(stream.advance(x) + stream.flush(), 1)[:, :8], outputs[0])


PROCESS = """
import sys
import torch
from seqssm import hub
from seqssm.streaming import Stream
stream = Stream(hub.load_model("model"), 7)
stream.restore(open("blob", "rb").read())
x = torch.load("x")
torch.save((torch.cat(stream.advance(x) + stream.flush(), 1), stream.position), "y")
"""


def test_a_snapshot_goes_on_in_another_process(tmp_path):
    model = make()
    stream = Stream(model, 7)
    stream.advance(tokens()[:, :40])
    blob = stream.snapshot()
    expected = torch.cat(stream.advance(tokens()[:, 40:]) + stream.flush(), 1)
    config = {"task": "seqssm.backbone.LanguageModel", "init_args": model.init_args()}
    hub.save(tmp_path / "model", config, model.state_dict())
    (tmp_path / "blob").write_bytes(blob)
    torch.save(tokens()[:, 40:], tmp_path / "x")
    subprocess.run([sys.executable, "-c", PROCESS], check=True, cwd=tmp_path)
    y, position = torch.load(tmp_path / "y")
    assert torch.equal(y, expected)
    assert position == 61
    # Restored in place it forgets what came since.
    stream.restore(blob)
    assert stream.position == 35
    assert torch.equal(torch.cat(stream.advance(tokens()[:, 40:]) + stream.flush(), 1), expected)


def test_a_fresh_and_an_ended_stream_can_be_saved():
    fresh = Stream(make(), 7)
    blob = fresh.snapshot()
    expected = run(fresh, tokens(), [61])
    other = Stream(make(), 7)
    other.restore(blob)
    assert torch.equal(run(other, tokens(), [61]), expected)
    other.restore(fresh.snapshot())
    with pytest.raises(ValueError, match="ended"):
        other.advance(tokens())


def window_of(size: int) -> BackboneConfig:
    spec = MixerSpec(class_path="Attention", init_args={"heads": 2, "window": size})
    return BackboneConfig(d_model=16, n_layers=1, mixers={"w": spec}, pattern="w")


def test_what_does_not_belong_is_refused_in_one_line():
    stream = Stream(make(), 7)
    stream.advance(tokens())
    blob = stream.snapshot()
    same_weights = Stream(make(config=window_of(4)), 7).snapshot()
    for target, bad, words in [
        (Stream(make(seed=1), 7), blob, "another model"),
        (Stream(make(config=window_of(5)), 7), same_weights, "another model"),
        (Stream(make(), 8), blob, "chunk 7, not 8"),
        (Stream(make(), 7, batch=2), blob, "batch 1, not 2"),
        (stream, blob.replace(b'"version":"1"', b'"version":"9"'), "another version"),
        (stream, blob[:-5], "damaged"),
        (stream, b"RIFF", "not a snapshot"),
        (stream, b"\x05\0\0\0\0\0\0\0hello", "not a snapshot"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            target.restore(bad)
        assert "\n" not in str(caught.value)


def test_misuse_is_named():
    model = make()
    with pytest.raises(ValueError, match="eval"):
        Stream(model.train(), 7)
    with pytest.raises(ValueError, match="positive"):
        Stream(model.eval(), 0)
    with pytest.raises(UserError, match="cannot carry a state"):
        Stream(Backbone(BackboneConfig(d_model=16, bidirectional="tied")).eval(), 7)
    stream = Stream(model, 7)
    with pytest.raises(ValueError, match="batch 1"):
        stream.advance(tokens().expand(2, -1))
    stream.advance(tokens())
    with pytest.raises(ValueError, match="keep their kind"):
        stream.advance(tokens().float())


def test_fingerprints_tell_models_apart():
    model = make()
    assert fingerprint(model) == fingerprint(make())
    with torch.no_grad():
        model.backbone.norm.weight[3] += 1e-6
    assert fingerprint(model) != fingerprint(make())
    faster = BackboneConfig(**{**CONFIG.to_dict(), "backend": "torch", "checkpoint_activations": True})
    assert fingerprint(make(config=faster)) == fingerprint(make())
    assert fingerprint(nn.Linear(2, 2).bfloat16()) != fingerprint(nn.Linear(2, 2))
