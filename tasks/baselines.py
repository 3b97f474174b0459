"""What baselines of all tasks share, and those that any DNA classifier has to beat.

They are fitted on the windows the model was trained on. Everything that is chosen (k, regularisation, epoch) is
chosen by the log loss on the validation windows.
"""

from __future__ import annotations

import copy
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from seqssm.errors import UserError
from seqssm.tasks.kmers import canonical_kmers

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Progress = Callable[[float], None]
"""Told the share of the work that is done, 0 to 1."""

MAX_FEATURES = 2**28
"""Numbers in a table of training features; with more windows than fit, an even selection of them is used."""


class Labelled(Protocol):
    """What baselines are fitted on: ``labels`` are (n,) class ids, or (n, c) zeros and ones."""

    @property
    def labels(self) -> NDArray[Any]: ...

    def __len__(self) -> int: ...


D = TypeVar("D", bound=Labelled)


@dataclass(frozen=True)
class Windows:
    """Labelled windows.

    Attributes:
        sequences: n token arrays (l,) uint8 of any lengths, memory maps included, or one array (n, l). Bases are 0 to
            3; anything above (N, padding) is no base.
        labels: (n,) int64 class ids.
    """

    sequences: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.sequences) != len(self.labels):
            raise ValueError(f"{len(self.sequences)} sequences with {len(self.labels)} labels")

    @classmethod
    def read(cls, dataset: Iterable[Any]) -> Self:
        """All windows of a data set whose items have ``tokens`` and ``label``."""
        pairs = [(sample.tokens, sample.label) for sample in dataset]
        return cls([tokens for tokens, _ in pairs], np.array([label for _, label in pairs], np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: NDArray[np.integer]) -> Windows:
        return Windows([self.sequences[i] for i in which], self.labels[which])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each window."""
        return np.array([len(sequence) for sequence in self.sequences], np.int64)


class Baseline(ABC, Generic[D]):
    """A classifier of windows, or clips, that is fitted once.

    Args:
        n_classes: columns of the probabilities, whether or not a class occurs in training.
        balance: weight the classes equally in fitting and choosing, for a model that was trained so.
        seed: of everything random.
    """

    name: str

    def __init__(self, n_classes: int, *, balance: bool = False, seed: int = 0) -> None:
        self.n_classes, self.balance, self.seed = n_classes, balance, seed
        self.settings: dict[str, Any] = {}  # what was chosen and seen in fitting, for the report

    @abstractmethod
    def fit(self, train: D, validation: D, progress: Progress = lambda share: None) -> Self:
        """Fit on the training windows, choose on the validation windows."""

    @abstractmethod
    def predict_proba(self, windows: D) -> NDArray[np.float64]:
        """(n, c) probabilities."""

    def sample_weights(self, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) weight of each window, 1 on average: equal, or such that each class that occurs weighs the same."""
        if not self.balance:
            return np.ones(len(labels))
        counts = np.bincount(labels, minlength=self.n_classes)
        return len(labels) / (np.count_nonzero(counts) * counts[labels])

    def log_loss(self, probabilities: NDArray[np.float64], labels: NDArray[Any]) -> float:
        """Mean of -log p(true class), by the sample weights; of (n, c) labels, the mean over clips and classes."""
        if labels.ndim == 2:
            right = np.where(labels > 0, probabilities, 1 - probabilities)
            return float(-np.log(np.clip(right, 1e-12, 1)).mean())
        p = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
        return float(np.average(-np.log(p), weights=self.sample_weights(labels)))


class Majority(Baseline[Labelled]):
    """The class shares of the training windows, whatever the sequence."""

    name = "majority"

    def fit(self, train: Labelled, validation: Labelled, progress: Progress = lambda share: None) -> Self:
        labels = train.labels
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=self.n_classes)
        self.shares = counts / len(labels)
        self.settings = {"class": int(counts.argmax())}
        progress(1.0)
        return self

    def predict_proba(self, windows: Labelled) -> NDArray[np.float64]:
        return np.tile(self.shares, (len(windows), 1))


class CompositionRegression(Baseline[Windows]):
    """Logistic regression on standardised shares of k-mers, both strands as one.

    The L2 penalty is 1 / (2 C) of scikit-learn; C and the k-mers are chosen.

    Args:
        name: what reports call it.
        candidates: sets of k to choose from; the features of one set stand side by side.
    """

    PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # values of C

    def __init__(
        self, name: str, candidates: Sequence[tuple[int, ...]], n_classes: int, *, balance: bool = False, seed: int = 0
    ) -> None:
        super().__init__(n_classes, balance=balance, seed=seed)
        self.name, self.candidates = name, candidates

    def fit(self, train: Windows, validation: Windows, progress: Progress = lambda share: None) -> Self:
        best = np.inf
        for number, ks in enumerate(self.candidates):
            sample = self._selection(train, ks)
            features = self._features(sample, ks)
            mean, scale = features.mean(axis=0), features.std(axis=0)
            scale[scale == 0] = 1
            features -= mean
            features /= scale
            held_out = (self._features(validation, ks) - mean) / scale
            weights = self.sample_weights(sample.labels)
            regression, last = self._regression(), np.inf
            for step, penalty in enumerate(self.PENALTIES):
                self._solve(regression.set_params(C=penalty), features, sample.labels, weights)
                loss = self.log_loss(self._probabilities(regression, held_out), validation.labels)
                progress((number + (step + 1) / len(self.PENALTIES)) / len(self.candidates))
                if loss < best:
                    best = loss
                    self.chosen = (ks, mean, scale, copy.deepcopy(regression))
                    self.settings = {
                        "k": list(ks),
                        "C": penalty,
                        "validation_log_loss": loss,
                        "train_windows": len(sample),
                    }
                if loss > last:  # less penalty only overfits from here on
                    break
                last = loss
        progress(1.0)
        return self

    def predict_proba(self, windows: Windows) -> NDArray[np.float64]:
        ks, mean, scale, regression = self.chosen
        return self._probabilities(regression, (self._features(windows, ks) - mean) / scale)

    def _features(self, windows: Windows, ks: tuple[int, ...]) -> NDArray[np.float32]:
        return np.concatenate([canonical_kmers(windows.sequences, k) for k in ks], axis=1)

    def _selection(self, train: Windows, ks: tuple[int, ...]) -> Windows:
        limit = MAX_FEATURES // sum(4**k // 2 for k in ks)
        if len(train) <= limit:
            return train
        return train[np.sort(np.random.default_rng(self.seed).permutation(len(train))[:limit])]

    def _regression(self) -> LogisticRegression:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(max_iter=300, warm_start=True)

    @staticmethod
    def _solve(
        regression: LogisticRegression,
        features: NDArray[np.float32],
        labels: NDArray[np.int64],
        weights: NDArray[np.float64],
    ) -> None:
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            # The last digits of the optimum do not matter: what counts is the loss on the validation windows.
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(features, labels, sample_weight=weights)

    def _probabilities(self, regression: LogisticRegression, features: NDArray[np.float32]) -> NDArray[np.float64]:
        probabilities = np.zeros((len(features), self.n_classes))
        probabilities[:, regression.classes_] = regression.predict_proba(features)
        return probabilities


def default_baselines(
    n_classes: int, *, balance: bool = False, reverse_complement: bool = True, seed: int = 0, device: str = "cpu"
) -> list[Baseline[Any]]:
    """The baselines that stand beside every score, from the cheapest to the dearest.

    Args:
        n_classes: of the task.
        balance: whether the model was trained with balanced classes.
        reverse_complement: whether the model saw both strands in training; the CNN then does, too.
        seed: of the CNN and of selections.
        device: where the CNN is trained.
    """
    from seqssm.tasks.cnn import SmallCNN

    return [
        Majority(n_classes, balance=balance, seed=seed),
        CompositionRegression("GC + dinucleotides", [(1, 2)], n_classes, balance=balance, seed=seed),
        CompositionRegression("k-mers", [(3,), (4,), (5,), (6,)], n_classes, balance=balance, seed=seed),
        SmallCNN(n_classes, balance=balance, seed=seed, reverse_complement=reverse_complement, device=device),
    ]


def select_baselines(baselines: Sequence[Baseline[D]], names: str) -> list[Baseline[D]]:
    """Those whose names are in ``names``, between commas; ``all`` for all.

    Raises:
        UserError: a name is none of theirs.
    """
    if names == "all":
        return list(baselines)
    wanted = [name.strip() for name in names.split(",")]
    known = {baseline.name: baseline for baseline in baselines}
    for name in wanted:
        if name not in known:
            raise UserError(f"--baselines: no baseline {name!r}; there are {', '.join(known)}; or say all or none")
    return [known[name] for name in wanted]


@dataclass(frozen=True)
class Fitted:
    """A baseline's outcome: (n, c) probabilities of the test and the validation windows, and what was chosen."""

    probabilities: NDArray[np.float64]
    validation: NDArray[np.float64]
    settings: dict[str, Any]


def run_baselines(baselines: Sequence[Baseline[Any]], train: D, validation: D, test: D) -> dict[str, Fitted]:
    """Fit every baseline and predict the test windows, a progress bar for each.

    Raises:
        ValueError: there is nothing to fit or choose on, or the training windows have one class.
    """
    from seqssm.data.progress import progress_bar

    if not len(validation) or len(np.unique(train.labels)) < 2:
        raise ValueError("baselines need validation windows, and training windows of two classes")
    fitted = {}
    for baseline in baselines:
        begin = time.monotonic()
        with progress_bar(f"baseline: {baseline.name}", 1000) as advance:
            done = 0

            def progress(share: float, advance: Callable[[int], None] = advance) -> None:
                nonlocal done
                advance(round(1000 * share) - done)
                done = round(1000 * share)

            baseline.fit(train, validation, progress)
            probabilities = baseline.predict_proba(test)
            held_out = probabilities if test is validation else baseline.predict_proba(validation)
        seconds = round(time.monotonic() - begin, 1)
        fitted[baseline.name] = Fitted(probabilities, held_out, {**baseline.settings, "seconds": seconds})
    return fitted
