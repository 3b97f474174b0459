"""Pretraining: what is a target, what may not change a prediction, that it learns, and where its weights go."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.cli import main
from seqssm.data.dna.alphabet import MASK, PAD, N, decode, encode, reverse_complement
from seqssm.data.dna.sampling import UnlabelledBatch
from seqssm.data.dna.unlabelled import UnlabelledDNA
from seqssm.errors import UserError
from seqssm.tasks.base import load_task, read_checkpoint
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.markov import MarkovChain
from seqssm.tasks.pretraining import DNAPretraining, Perplexity, generate, hide

MAMBA = {"m": MixerSpec(class_path="Mamba", init_args={"d_state": 4})}


def make_task(objective: str = "next_token", kmer: int = 1, motif: int = 0, **backbone) -> DNAPretraining:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=2, mixers=MAMBA, backend="torch", **backbone)
    return DNAPretraining(objective, config, kmer=kmer, motif=motif).eval()


def random_batch(lengths: list[int], seed: int = 0) -> UnlabelledBatch:
    rng = np.random.default_rng(seed)
    tokens = torch.full((len(lengths), max(lengths)), PAD, dtype=torch.uint8)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.from_numpy(rng.integers(0, 5, length))
    return UnlabelledBatch(tokens, torch.tensor(lengths), torch.from_numpy(rng.random(tokens.shape) < 0.3))


def test_15_percent_are_hidden_80_10_10_and_never_an_n() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, 3, N, PAD], (64, 4096))).to(torch.uint8)
    visible, chosen = hide(tokens, torch.Generator().manual_seed(1))
    assert int(tokens[chosen].max()) < N
    assert torch.equal(visible[~chosen], tokens[~chosen])
    assert chosen.sum() / (tokens < N).sum() == pytest.approx(0.15, abs=0.005)
    shown, true = visible[chosen], tokens[chosen]
    assert (shown == MASK).float().mean() == pytest.approx(0.8, abs=0.01)
    replaced = shown[shown != MASK]
    assert int(replaced.max()) < N
    # A quarter of the 10% drawn evenly from four bases is the true one, beside the 10% that stay.
    assert (shown == true).float().mean() == pytest.approx(0.125, abs=0.01)
    changed = shown[(shown != MASK) & (shown != true)]
    shares = torch.bincount(changed.long(), minlength=4) / len(changed)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("objective", ["next_token", "masked"])
def test_targets_are_bases_and_the_base_itself_is_out_of_sight(objective: str) -> None:
    task = make_task(objective, kmer=3, motif=4, bidirectional="none" if objective == "next_token" else "tied")
    batch = random_batch([50, 30])
    prediction = task.predict(batch, torch.Generator().manual_seed(0))
    assert torch.equal(prediction.target, batch.tokens[prediction.where].long())
    assert torch.equal(prediction.lower, batch.lower[prediction.where])
    assert int(prediction.target.max()) < 4
    if objective == "next_token":
        expected = batch.tokens < N
        expected[:, 0] = False
        assert torch.equal(prediction.where, expected)
        # A base changes the predictions behind it, never its own or those before.
        tokens = batch.tokens.clone()
        tokens[0, 20] = (tokens[0, 20] + 1) % 4
        with torch.no_grad():
            change = (task(tokens, batch.lengths) - task(batch.tokens, batch.lengths)).abs().amax(-1)
        assert change[0, :20].max() == 0
        assert change[0, 20] > 0
        assert change[1].max() == 0


@pytest.mark.parametrize(
    ("objective", "backbone"),
    [
        ("next_token", {}),
        ("masked", {"bidirectional": "tied"}),
        ("masked", {"bidirectional": "tied", "reverse_complement": True}),
    ],
)
def test_padding_and_neighbours_change_nothing(objective: str, backbone: dict) -> None:
    task = make_task(objective, kmer=2, **backbone).double()
    batch = random_batch([37, 64, 5])
    with torch.no_grad():
        together = task(batch.tokens, batch.lengths)
        for i, length in enumerate(batch.lengths.tolist()):
            alone = task(batch.tokens[i : i + 1, :length], batch.lengths[i : i + 1])
            torch.testing.assert_close(together[i : i + 1, :length], alone, atol=1e-8, rtol=0)


def test_strands_get_complementary_predictions() -> None:
    task = make_task("masked", kmer=2, bidirectional="tied", reverse_complement=True).double()
    tokens = random_batch([40]).tokens
    with torch.no_grad():
        one = task(tokens, torch.tensor([40]))
        other = task(reverse_complement(tokens), torch.tensor([40]))
    torch.testing.assert_close(other, one.flip(1, 2))


def test_lower_case_weighs_less_and_nothing_to_learn_is_no_nan() -> None:
    batch = random_batch([60])
    task = make_task()
    task.lower_weight = 0.25
    prediction = task.predict(batch)
    nll = -prediction.logits.log_softmax(-1).gather(1, prediction.target[:, None])[:, 0]
    weight = torch.where(prediction.lower, 0.25, 1.0)
    torch.testing.assert_close(task._loss(prediction), (nll * weight).sum() / weight.sum())
    empty = batch._replace(tokens=torch.full_like(batch.tokens, N))
    loss = task._loss(task.predict(empty))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("chunk", [7, 59])
def test_chunks_give_the_loss_the_gradients_and_the_logits_of_one_pass(chunk: int) -> None:
    task, batch = make_task(kmer=3, motif=4).double(), random_batch([60, 31])
    task.lower_weight = 0.25
    whole = task.training_step(batch, 0)
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in task.named_parameters()}
    with torch.no_grad():
        logits = task(batch.tokens, batch.lengths)
    task.zero_grad()
    task.chunk_length = chunk
    loss = task.training_step(batch, 0)
    loss.backward()
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        torch.testing.assert_close(task(batch.tokens, batch.lengths), logits, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "chunk", "message"),
    [
        ("masked", 64, "model.chunk_length is for objective next_token"),
        ("next_token", 3, "chunks of 3 positions, shorter than the convolution window"),
    ],
)
def test_chunks_that_cannot_be_are_refused(objective: str, chunk: int, message: str) -> None:
    config = BackboneConfig(d_model=16, n_layers=1, mixers=MAMBA)
    with pytest.raises(UserError, match=message):
        DNAPretraining(objective, config, chunk_length=chunk)


def test_perplexity_is_of_all_bases_not_a_mean_over_batches() -> None:
    metric = Perplexity()
    values = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([4.0])]
    for part in values:
        metric.update(part)
    torch.testing.assert_close(metric.compute(), torch.cat(values).mean().exp())


def test_a_model_that_would_see_the_answer_is_refused() -> None:
    with pytest.raises(UserError, match="would see the answer"):
        make_task("next_token", bidirectional="tied")


@pytest.mark.parametrize("prompt", ["A", "ACGTN" * 9])
def test_generation_is_the_whole_sequence_read_anew_for_every_base(prompt: str) -> None:
    task = make_task(kmer=3, motif=4)
    with torch.no_grad():
        task.base_head.weight.mul_(20)
    drawn = generate(task, prompt, 20, temperature=0, samples=2)
    text = prompt
    for _ in range(20):
        tokens = torch.from_numpy(encode(text).copy())[None]
        with torch.no_grad():
            text += decode(task(tokens, torch.tensor([len(text)]))[0, -1].argmax(-1)[None].to(torch.uint8))
    assert drawn == [text[len(prompt) :]] * 2
    first, again, other = (generate(task, prompt, 30, seed=seed, samples=2) for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] != first[1]
    assert set("".join(first)) <= set("ACGT")


def test_generation_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fills gaps"):
        generate(make_task("masked"), "A", 1)
    with pytest.raises(UserError, match="the prompt is not DNA: 'x' at position 2"):
        generate(make_task(), "Ax", 1)
    with pytest.raises(UserError, match="a prompt of a base or more"):
        generate(make_task(), "", 1)


# ---- Markov chains --------------------------------------------------------------------------------------------------


def test_markov_chain_against_counting_by_hand() -> None:
    train, text = "ACGTACGGNACTT", "TACGNGA"
    chain = MarkovChain(2).fit([encode(train)])

    def probability(context: str, base: str) -> float:
        below = probability(context[1:], base) if context else 0.25
        # Only full contexts of two bases count, of every order.
        stretches = [s[i : i + 3] for s in train.split("N") for i in range(len(s) - 2)]
        own = [s for s in stretches if s[:2].endswith(context)]
        return (sum(s[2] == base for s in own) + 8 * below) / (len(own) + 8)

    contexts = ["", "T", "TA", "AC", None, "", "G"]
    expected = [np.nan if c is None else -np.log(probability(c, b)) for c, b in zip(contexts, text, strict=True)]
    np.testing.assert_allclose(chain.nll(encode(text)), expected)


def test_markov_chain_finds_the_order_of_its_source() -> None:
    rng = np.random.default_rng(0)
    table = rng.dirichlet([0.3] * 4, 64)
    tokens = list(rng.integers(0, 4, 3))
    for _ in range(60_000):
        tokens.append(rng.choice(4, p=table[tokens[-3] * 16 + tokens[-2] * 4 + tokens[-1]]))
    data = np.array(tokens, np.uint8)
    chain = MarkovChain(6).fit([data[:40_000]]).choose([data[40_000:50_000]])
    assert chain.order == 3
    held_out = chain.nll(data[50_000:])
    context = data[50_000 - 3 : -1].astype(int)
    truth = table[data[49_997:-3] * 16 + data[49_998:-2].astype(int) * 4 + data[49_999:-1], data[50_000:]]
    assert context.size
    assert held_out[3:].mean() == pytest.approx(-np.log(truth[3:]).mean(), abs=0.02)
    both = MarkovChain(3, both_strands=True).fit([data])
    turned = reverse_complement(torch.from_numpy(data)[None])[0].numpy()
    assert both.nll(data).mean() == pytest.approx(both.nll(turned).mean(), abs=2e-3)


# ---- from files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genome that repeats a motif, half of it soft-masked, and intervals in HyenaDNA's format."""
    folder = tmp_path_factory.mktemp("genome")
    rng = np.random.default_rng(0)
    with open(folder / "genome.fa", "w") as fasta:
        for i in range(4):
            parts = ["GATTACCA" if rng.random() < 0.7 else "".join(rng.choice(list("ACGT"), 8)) for _ in range(600)]
            text = "".join(parts)
            fasta.write(f">chr{i}\n{text[:2400].lower()}{text[2400:]}\n")
    splits = ["train", "train", "valid", "test"]
    lines = [f"chr{i}\t{a}\t{a + 2400}\t{split}\n" for i, split in enumerate(splits) for a in (0, 2400)]
    (folder / "intervals.bed").write_text("".join(lines))
    return folder


def make_data(genome: Path, **changes) -> UnlabelledDNA:
    arguments = {"fasta": str(genome / "genome.fa"), "window_bp": 120, "batch_size": 8, **changes}
    return UnlabelledDNA(str(genome / "intervals.bed"), index_dir=str(genome / "index"), **arguments)


def test_windows_keep_their_case_on_either_strand(genome: Path) -> None:
    data = make_data(genome, rc_probability=0.5)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, UnlabelledBatch)
    windows, flip = data.train.draw(0)
    assert 0 < flip[:8].sum() < 8
    for i in range(8):
        letters = data.train.library.letters(windows.record_id[i], windows.start_bp[i], windows.end_bp[i])
        text = letters.tobytes().decode()
        lower, tokens = [c.islower() for c in text], torch.from_numpy(encode(text).copy())
        if flip[i]:
            lower, tokens = lower[::-1], reverse_complement(tokens[None])[0]
        assert batch.lower[i].tolist() == lower
        assert torch.equal(batch.tokens[i], tokens)
    assert data.report.bases == {"train": 9600, "val": 4800, "test": 4800}


def test_fit_evaluate_and_start_a_classifier(genome: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["fit", "--config", "dna/pretrain", "--data.path", str(genome / "intervals.bed")]
    arguments += ["--data.fasta", str(genome / "genome.fa"), "--data.index_dir", str(genome / "index")]
    arguments += ["--data.window_bp", "120", "--data.batch_size", "8", "--data.num_workers", "0"]
    arguments += ["--data.windows_per_epoch", "160", "--model.backbone.d_model", "16", "--model.backbone.n_layers", "1"]
    arguments += ["--model.optimizer.lr", "0.02", "--trainer.max_epochs", "3", "--trainer.precision", "32"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.logger.save_dir", str(tmp_path), "--evaluate", "true"]
    assert main(arguments) == 0
    report = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    perplexity = report["perplexity"]
    assert report["bases"] == 40 * 119
    names = list(perplexity)
    assert names[:2] == ["model", "composition"]
    assert names[2].startswith("Markov chain, order")
    assert perplexity["model"]["low"] < perplexity["model"]["value"] < perplexity["model"]["high"] < 3.4
    assert perplexity[names[2]]["value"] < perplexity["composition"]["value"] < 4
    checkpoint = str(next(tmp_path.rglob("best*.ckpt")))
    source = load_task(checkpoint, DNAPretraining)
    capsys.readouterr()
    task = DNAClassification(["a", "b"], source.backbone_config, init_from=checkpoint)
    weights = read_checkpoint(checkpoint).weights
    shared = [name for name in task.state_dict() if name.startswith(("backbone.", "embedding."))]
    for name in shared:
        torch.testing.assert_close(task.state_dict()[name], weights[name])
    assert len(shared) == len(weights) - 2  # the head stays behind


def test_init_from_says_what_fits_and_refuses_other_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from seqssm import hub

    source = make_task(kmer=3)
    folder = str(hub.save(tmp_path / "model", source.describe(), source.state_dict()))
    with caplog.at_level("INFO"):
        DNAClassification(["a", "b"], source.backbone_config, kmer=3, motif=5, init_from=folder)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "(other labels): embedding.motifs.weight, head.1.weight, head.1.bias\n" in said
    assert "not used: base_head.bias, base_head.weight\n" in said
    with pytest.raises(UserError, match=r"embedding\.kmers\.weight \(\(65, 16\) there, \(257, 16\) here\)"):
        DNAClassification(["a", "b"], source.backbone_config, kmer=4, init_from=folder)
    with pytest.raises(UserError, match=r"weights do not fit this model, the first backbone\..*n_layers 2 -> 3"):
        DNAClassification(["a", "b"], BackboneConfig(d_model=16, n_layers=3, mixers=MAMBA), init_from=folder)
