"""Training clips that lie on the model's device, and are drawn, mixed and augmented there, a batch at once.

The loader's processes read, augment and hand over some hundred kilobytes a clip; where that is slower than the model,
the same augmentation is a few kernels on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from seqssm.data.audio.augment import EMPTY_LEVEL_DB, AugmentConfig, buried_stretch, draw_masks, draw_response
from seqssm.data.audio.batches import AudioBatch, SampleBatch, with_features
from seqssm.data.audio.sampling import TrainingClips
from seqssm.data.loading import EpochSampler
from seqssm.errors import UserError

OVERLAY_LEVEL = 0.05  # root mean square of each clip of a mixture, give or take SPREAD_DB
SPREAD_DB = 5.0


class DeviceClips:
    """The clips of a training data set on a device, and batches of them.

    What is drawn follows :class:`TrainingClips` in distribution, not in the numbers. A batch is a function of the seed
    and the number of its first item.

    Args:
        clips: what to train on.
        device: where.

    Raises:
        UserError: an augmentation has no form for a device.
    """

    def __init__(self, clips: TrainingClips, device: torch.device) -> None:
        self.clips, self.device = clips, device
        self.augment = clips.augment
        if self.augment is not None and self.augment.speed:
            raise UserError("augment.speed is made in the loader's processes alone: set augment_on: loader, or speed 0")
        samples = [clips.split.store[int(number)] for number in clips.split.numbers]
        self.samples, self.offsets, self.sizes = self._laid_out(samples)
        if clips.noise:
            self.noise, self.noise_offsets, self.noise_sizes = self._laid_out(clips.noise)

    def _laid_out(self, parts: list[NDArray[np.float32]]) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """One after another on the device; where each begins, and how long it is."""
        sizes = np.array([len(part) for part in parts], np.int64)
        joined = torch.from_numpy(np.concatenate(parts)).to(self.device)
        return joined, np.cumsum(sizes) - sizes, sizes

    def batch(self, items: list[int]) -> AudioBatch:
        """The items of these numbers, with their features."""
        clips, augment = self.clips, self.augment
        epochs, at = np.divmod(np.array(items), clips.clips_per_epoch)
        first = np.array([clips.order(int(epoch))[i] for epoch, i in zip(epochs, at, strict=True)])
        rng = np.random.default_rng([clips.seed, items[0], 6])
        members, shares = self._members(first, rng)  # (b, k)
        used = np.minimum(self.sizes[members], clips.crop or self.sizes[members])
        used[shares == 0] = 0
        counts = used[:, 0] if clips.mix_clips is None else used.max(1)
        parts = [self._read(members[:, k], used[:, k], counts, rng) for k in range(members.shape[1])]
        real = torch.arange(int(counts.max()), device=self.device) < self._put(counts)[:, None]
        samples = self._overlaid(parts, shares, rng) if clips.mix_clips is not None else self._mixed(parts, shares)
        targets = clips.split.targets[members]  # (b, k, c)
        if clips.mix_clips is not None:
            labels = np.asarray((targets & (shares > 0)[..., None]).any(1), np.float32)
        else:
            labels = np.asarray((targets * shares[..., None]).sum(1), np.float32)
        time = mel = responses = None
        if augment is not None:
            empty = rng.random(len(items)) < augment.empty
            samples = self._augmented(samples, real, counts, empty, augment, rng)
            labels[empty] = 0.0 if clips.multi_label else 1 / labels.shape[1]
            shares = np.where(empty[:, None], 0, shares)
            drawn = [draw_masks(augment, clips.features, clips.features.frames(int(n)), rng) for n in counts]
            time, mel = (
                self._put(np.stack([one.time for one in drawn])),
                self._put(np.stack([one.mel for one in drawn])),
            )
            if augment.equalizer_db:
                responses = self._put(np.stack([draw_response(augment, clips.features, rng) for _ in items]))
        return with_features(
            SampleBatch(
                samples,
                self._put(counts),
                self._put(labels if clips.several else labels.argmax(1)),
                self._put(np.where((shares > 0) | (np.arange(members.shape[1]) == 0), members, -1)),
                self._put(shares.astype(np.float32)),
                time,
                mel,
                responses,
            ),
            clips.features,
        )

    def _members(self, first: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Positions of the clips that make up each item (b, k), and their shares; a share of 0 is no part of it."""
        clips, count = self.clips, len(first)
        if clips.mix_clips is not None:
            drawn = [clips.split.draw_mixture(int(one), clips.mix_clips, rng) for one in first]
            members = np.zeros((count, max(map(len, drawn))), np.int64)
            shares = np.zeros(members.shape)
            for row, one in enumerate(drawn):
                members[row, : len(one)], shares[row, : len(one)] = one, 1
            return members, shares
        if self.augment is None or not self.augment.mixup:
            return first[:, None], np.ones((count, 1))
        mixed = rng.random(count) < self.augment.mixup
        second = rng.choice(len(clips.split), count, p=clips.chance)
        share = np.where(mixed, rng.beta(self.augment.mixup_alpha, self.augment.mixup_alpha, count), 1)
        return np.stack([first, np.where(mixed, second, first)], 1), np.stack([share, 1 - share], 1)

    def _read(
        self,
        members: NDArray[np.int64],
        used: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> Tensor:
        """A random stretch of ``used`` (b,) samples of each clip, rolled, at a random place of the (b, n) result."""
        longest = 0 if self.augment is None else round(self.augment.shift_s * self.clips.features.sample_rate)
        begin = rng.integers(0, self.sizes[members] - used, endpoint=True)
        roll = rng.integers(-longest, longest, len(members), endpoint=True)
        place = rng.integers(0, np.maximum(counts - used, 0), endpoint=True)
        at = torch.arange(int(counts.max()), device=self.device) - self._put(place)[:, None]
        known = self._put(np.minimum(used, counts))[:, None]
        inside = (at >= 0) & (at < known)
        turned = torch.remainder(at - self._put(roll)[:, None], self._put(np.maximum(used, 1))[:, None])
        where = turned + self._put(self.offsets[members] + begin)[:, None]
        return self.samples[where].masked_fill(~inside, 0)

    def _mixed(self, parts: list[Tensor], shares: NDArray[Any]) -> Tensor:
        return sum(
            (part * self._put(shares[:, k].astype(np.float32))[:, None] for k, part in enumerate(parts[1:], 1)),
            parts[0] * self._put(shares[:, 0].astype(np.float32))[:, None],
        )

    def _overlaid(self, parts: list[Tensor], shares: NDArray[Any], rng: np.random.Generator) -> Tensor:
        """Clips that sound at once; see :func:`seqssm.data.audio.augment.overlay`."""
        total = torch.zeros_like(parts[0])
        for k, part in enumerate(parts):
            size = (part != 0).sum(1).clamp(min=1)
            level = (part.square().sum(1) / size).sqrt().clamp(min=1e-8)
            spread = 10 ** (rng.uniform(-SPREAD_DB, SPREAD_DB, len(part)) / 20) * (shares[:, k] > 0)
            total = total + part * (OVERLAY_LEVEL / level * self._put(spread.astype(np.float32)))[:, None]
        return total / total.abs().amax(1, keepdim=True).clamp(min=1)

    def _augmented(
        self,
        samples: Tensor,
        real: Tensor,
        counts: NDArray[np.int64],
        empty: NDArray[np.bool_],
        augment: AugmentConfig,
        rng: np.random.Generator,
    ) -> Tensor:
        """Samples (b, n) at other levels, with noise, in noise or noise alone."""
        gain = 10 ** (rng.uniform(-augment.gain_db, augment.gain_db, len(samples)) / 20)
        samples = samples * self._put(gain.astype(np.float32))[:, None]
        noisy = rng.random(len(samples)) < augment.noise
        buried = (rng.random(len(samples)) < augment.buried) & ~empty
        ratio = 10 ** (-rng.uniform(*augment.noise_snr_db, len(samples)) / 20) * noisy
        alone = 10 ** (rng.uniform(*EMPTY_LEVEL_DB, len(samples)) / 20)
        rows = np.flatnonzero(noisy | empty | buried)
        if not len(rows):
            return samples
        noise = self._noise(len(rows), samples.shape[1], rng)
        size, chosen = self._put(counts[rows]), self._put(rows)
        mask = real[chosen]

        def level(x: Tensor) -> Tensor:
            return (x.square().masked_fill(~mask, 0).sum(1) / size).sqrt()

        heard = samples[chosen]
        ends = np.stack([np.zeros(len(rows), np.int64), counts[rows]], 1)  # of what is left of each
        for i, row in enumerate(rows):
            if empty[row] or buried[row]:
                ends[i] = (0, 0) if empty[row] else buried_stretch(int(counts[row]), rng)
        left = self._put(ends)
        at = torch.arange(samples.shape[1], device=self.device)
        kept = heard.masked_fill((at < left[:, :1]) | (at >= left[:, 1:]), 0)
        wanted = torch.where(
            self._put((empty | buried)[rows]),
            self._put(alone[rows].astype(np.float32)),
            level(heard) * self._put(ratio[rows].astype(np.float32)),
        )
        noise = noise * (wanted / level(noise).clamp(min=1e-12))[:, None]
        return samples.index_copy(0, chosen, (noise + kept).masked_fill(~mask, 0))

    def _noise(self, rows: int, count: int, rng: np.random.Generator) -> Tensor:
        """(rows, count) of noise: stretches of recordings where there are some, else white to brown."""
        if self.clips.noise:
            chosen = rng.integers(len(self.noise_sizes), size=rows)
            begin = rng.integers(0, np.maximum(self.noise_sizes[chosen] - count, 0), endpoint=True)
            at = torch.arange(count, device=self.device) + self._put(begin)[:, None]
            at = torch.remainder(at, self._put(self.noise_sizes[chosen])[:, None])  # short ones again and again
            return self.noise[at + self._put(self.noise_offsets[chosen])[:, None]]
        size = 1 << max(count - 1, 1).bit_length()
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        spectrum = torch.fft.rfft(torch.randn(rows, size, generator=generator, device=self.device))
        slope = self._put(rng.uniform(0, 2, rows).astype(np.float32))[:, None]
        octaves = torch.arange(spectrum.shape[1], device=self.device).clamp(min=1).log()
        return torch.fft.irfft(spectrum * (-slope / 2 * octaves).exp(), size)[:, :count]

    def _put(self, array: NDArray[Any]) -> Tensor:
        # Not to wait is not to let the GPU finish its last step first; CUDA takes its copy before it returns.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


class DeviceLoader:
    """Batches of :class:`DeviceClips`, which a Lightning checkpoint remembers as those of a ``ResumableLoader``.

    Args:
        clips: on their device.
        batch_size: items a batch.
        sampler: gives their numbers.
    """

    def __init__(self, clips: DeviceClips, batch_size: int, sampler: EpochSampler) -> None:
        self.clips, self.batch_size, self.sampler = clips, batch_size, sampler
        self._batches = 0

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[AudioBatch]:
        self._batches = self.sampler.first_batch
        items = list(self.sampler)
        for begin in range(0, len(items), self.batch_size):
            batch = self.clips.batch(items[begin : begin + self.batch_size])
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches have been given out."""
        return {"epoch": self.sampler.epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the last batch given out."""
        finished = state["batches"] >= len(self)
        self.sampler.epoch = state["epoch"] + finished
        self.sampler.first_batch = 0 if finished else state["batches"]


class KeptBatches:
    """The batches of a loader whose items never change: made once, then kept on a device."""

    def __init__(self, loader: DataLoader, device: torch.device, features: Any) -> None:
        self.loader, self.device, self.features = loader, device, features
        self._kept: list[AudioBatch] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[AudioBatch]:
        if len(self._kept) < len(self):
            self._kept = []
            for batch in self.loader:
                moved = type(batch)(*(part.to(self.device) if part is not None else None for part in batch))
                made = with_features(moved, self.features) if isinstance(moved, SampleBatch) else moved
                self._kept.append(made)
        yield from self._kept
