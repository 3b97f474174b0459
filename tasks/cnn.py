"""The plain convolutional network that a sequence model has to beat."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqssm.data.dna.alphabet import PAD, VOCABULARY_SIZE, A, C, G, T, reverse_complement
from seqssm.tasks.baselines import Baseline, Progress, Windows

SHORT_BP = 320
"""Up to here, windows of one length are taken to be aligned (at a promoter's start, a binding site's centre)."""
SEGMENT_BP = 2**17
"""Longer windows are convolved in pieces; a seam touches a few tens of bases."""


class ConvolutionalNetwork(nn.Module):
    """Three convolutions on one-hot bases and a hidden layer, about 250 thousand parameters.

    Args:
        n_classes: outputs.
        bins: 1 pools each channel over the whole window, by maximum and mean, which suits any length; more keep where
            in the window it was found, as the maximum within each bin, for aligned windows of one length.
        pool: width of the max pooling after the first and the second convolution.
        channels, widths, dropout: of the layers.
    """

    def __init__(
        self,
        n_classes: int,
        bins: int = 1,
        pool: int = 2,
        channels: int = 128,
        widths: tuple[int, int, int] = (11, 7, 5),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.bins, self.pool, self.dropout = bins, pool, dropout
        inputs = (4, channels, channels)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(c, channels, width, padding=width // 2) for c, width in zip(inputs, widths, strict=True)
        )
        features = channels * (bins if bins > 1 else 2)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(features, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, n_classes)
        )
        one_hot = torch.zeros(VOCABULARY_SIZE, 4)
        one_hot[[A, C, G, T]] = torch.eye(4)
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.one_hot: Tensor

    def forward(self, tokens: Tensor, lengths: Tensor, max_tokens: int = 2**21) -> Tensor:
        """Score windows.

        Args:
            tokens: (b, l) uint8, padded on the right.
            lengths: (b,) real tokens of each window, at least 1.
            max_tokens: convolved at once; more are taken in turns that keep no activations for the backward pass.

        Returns:
            (b, c) logits, the same for any padding.
        """
        batch, longest = tokens.shape
        if self.bins > 1:
            x, _ = self._convolve(tokens, lengths)
            return self.head(F.adaptive_max_pool1d(x, self.bins).flatten(1))
        size = min(longest, SEGMENT_BP)
        pieces = -(-longest // size)
        segments = F.pad(tokens, (0, pieces * size - longest), value=PAD).view(batch * pieces, size)
        starts = torch.arange(pieces, device=tokens.device) * size
        left = (lengths[:, None] - starts).clamp(0, size).flatten()  # (b * pieces,) real tokens in each
        chosen = left.nonzero().squeeze(1)
        turns = chosen.split(max(1, max_tokens // size))
        pooled = [
            checkpoint(self._pool, segments[turn], left[turn], use_reentrant=False)
            if len(turns) > 1 and torch.is_grad_enabled()
            else self._pool(segments[turn], left[turn])
            for turn in turns
        ]
        peak, total, count = (
            torch.zeros(batch * pieces, *parts[0].shape[1:], device=tokens.device)
            .index_copy(0, chosen, torch.cat(parts))
            .unflatten(0, (batch, pieces))
            for parts in zip(*pooled, strict=True)
        )
        # Features are not negative, so the zeros of an empty piece change neither maximum nor sum.
        return self.head(torch.cat([peak.amax(1), total.sum(1) / count.sum(1)], dim=1))

    def _convolve(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(b, channels, l') features, zero beyond the real tokens, and (b,) how many of them are real."""
        x = self.one_hot[tokens.long()].transpose(1, 2)  # (b, 4, l)
        padded = bool((lengths < tokens.shape[1]).any())
        for i, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if padded:
                beyond = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
                x = x.masked_fill(beyond[:, None], -torch.inf)
            if i < 2:
                x = F.max_pool1d(x, self.pool, ceil_mode=True)
                lengths = -(-lengths // self.pool)
            x = F.relu(x)  # after the pooling, which commutes with it and leaves less to do
            if i < 2:
                x = F.dropout(x, self.dropout, self.training)
        return x, lengths

    def _pool(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum and sum (b, channels) of the features, and of how many positions (b, 1)."""
        x, count = self._convolve(tokens, lengths)
        return x.amax(2).float(), x.sum(2, dtype=torch.float32), count[:, None].float()


class SmallCNN(Baseline[Windows]):
    """``ConvolutionalNetwork`` trained from scratch: AdamW, one learning rate cycle, cross-entropy.

    The epoch with the lowest log loss on the validation windows is kept.

    Args:
        n_classes, balance, seed: see ``Baseline``; ``balance`` weights the loss.
        reverse_complement: turn every other training window, at random, to the other strand, and average the
            probabilities of both strands in predicting.
        epochs, batch_size, learning_rate: of the training. Fewer windows than 64 batches make the batch smaller.
        device: where to train.
    """

    name = "small CNN"

    def __init__(
        self,
        n_classes: int,
        *,
        balance: bool = False,
        seed: int = 0,
        reverse_complement: bool = True,
        epochs: int = 8,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        device: str = "cpu",
    ) -> None:
        super().__init__(n_classes, balance=balance, seed=seed)
        self.reverse_complement, self.epochs, self.batch_size = reverse_complement, epochs, batch_size
        self.learning_rate, self.device = learning_rate, torch.device(device)
        self.max_tokens = 2**21 if self.device.type == "cuda" else 2**15  # what fits a small GPU, and a CPU's cache

    def fit(self, train: Windows, validation: Windows, progress: Progress = lambda share: None) -> Self:
        lengths = train.lengths
        short = lengths.max() <= SHORT_BP
        aligned = bool(short and lengths.min() == lengths.max() == validation.lengths.min() == validation.lengths.max())
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(self.seed)
            self.network = ConvolutionalNetwork(self.n_classes, 8 if aligned else 1, 2 if short else 4).to(self.device)
            self._train(train, validation, progress)
        self.settings["parameters"] = sum(p.numel() for p in self.network.parameters())
        return self

    def _train(self, train: Windows, validation: Windows, progress: Progress) -> None:
        size = max(4, min(self.batch_size, len(train) // 64))
        steps = self.epochs * -(-len(train) // size)
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.2)
        weights = torch.as_tensor(self.sample_weights(train.labels), dtype=torch.float32)
        labels = torch.as_tensor(train.labels)
        best, state, step = float("inf"), self.network.state_dict(), 0
        for epoch in range(self.epochs):
            self.network.train()
            for rows in torch.randperm(len(train)).split(size):
                tokens, lengths = self._batch(train, rows.numpy())
                if self.reverse_complement:
                    turned = torch.rand(len(rows)) < 0.5
                    tokens[turned] = reverse_complement(tokens[turned], lengths[turned])
                optimizer.zero_grad()
                for part in torch.arange(len(rows)).split(max(1, self.max_tokens // tokens.shape[1])):
                    logits = self._logits(tokens[part], lengths[part])
                    target, weight = labels[rows[part]].to(self.device), weights[rows[part]].to(self.device)
                    loss = (weight * F.cross_entropy(logits, target, reduction="none")).sum() / len(rows)
                    loss.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                step += 1
                progress(step / steps)
            held_out = self.log_loss(self.predict_proba(validation), validation.labels)
            if held_out < best:
                best, state = held_out, copy.deepcopy(self.network.state_dict())
                self.settings = {"epoch": epoch + 1, "validation_log_loss": best}
        self.network.load_state_dict(state)

    @torch.no_grad()
    def predict_proba(self, windows: Windows) -> NDArray[np.float64]:
        self.network.eval()
        lengths_bp = windows.lengths
        order = np.argsort(lengths_bp, kind="stable")
        parts = [order]
        if self.network.bins > 1:  # bins divide a whole window, so a batch then holds one length
            parts = np.split(order, np.flatnonzero(np.diff(lengths_bp[order])) + 1)
        size = self.batch_size
        out = np.zeros((len(windows), self.n_classes))
        for rows in (part[i : i + size] for part in parts for i in range(0, len(part), size)):
            tokens, lengths = self._batch(windows, rows)
            probabilities = self._logits(tokens, lengths).double().softmax(1)
            if self.reverse_complement:
                other = self._logits(reverse_complement(tokens, lengths), lengths).double().softmax(1)
                probabilities = (probabilities + other) / 2
            out[rows] = probabilities.cpu().numpy()
        return out

    def _logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits: Tensor = self.network(tokens.to(self.device), lengths.to(self.device), self.max_tokens)
        return logits.float()

    def _batch(self, windows: Windows, rows: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
        """(b, l) uint8 tokens, padded on the right, and (b,) lengths."""
        sequences: list[Any] = [np.asarray(windows.sequences[row]) for row in rows]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        tokens = np.full((len(sequences), int(lengths.max())), PAD, np.uint8)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        return torch.from_numpy(tokens), lengths
