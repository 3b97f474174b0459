"""The DNA classifier: a sequence in, one label out, from tens of bases to whole chromosomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data.dna.alphabet import reverse_complement
from seqssm.data.dna.prediction import FastaWindow, FastaWindows, is_sequence, sequence_windows, window_batches
from seqssm.errors import UserError
from seqssm.longcontext.chunked import check_chunkable, fold_backbone
from seqssm.tasks.composition import Composition
from seqssm.tasks.dna_layers import Pooling, PoolingMode, SequenceEmbedding
from seqssm.tasks.network import Network


class LabelledWindow(NamedTuple):
    """Bases start_bp to end_bp (0-based, exclusive) of a record, their label, and a probability a label.

    Both are None for a window of nothing but N.
    """

    record: str
    start_bp: int
    end_bp: int
    label: str | None
    probabilities: list[float] | None


class DNANetwork(Network):
    """Score DNA sequences.

    Its arguments are those of :class:`seqssm.tasks.dna.DNAClassification` that a trained model needs.
    """

    kind: ClassVar[str] = "DNA classifier"
    head_parts: ClassVar[tuple[str, ...]] = ("head", "standardize", "composition")

    def __init__(
        self,
        labels: list[str],
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        kmer: int = 1,
        motif: int = 0,
        motif_layers: int = 0,
        patch: int = 1,
        positions: int = 0,
        pooling: PoolingMode = "mean",
        pool_bins: int = 1,
        standardize: bool = False,
        composition: int = 0,
        composition_only: bool = False,
        head_dropout: float = 0.0,
        average_strands: bool = True,
        chunk_length: int = 0,
        chunk_offload: bool = False,
        chunk_kept: int = 1,
        members: int = 1,
        **training: Any,
    ) -> None:
        super().__init__(
            backbone,
            labels=list(labels),
            kmer=kmer,
            motif=motif,
            motif_layers=motif_layers,
            patch=patch,
            positions=positions,
            pooling=pooling,
            pool_bins=pool_bins,
            standardize=standardize,
            composition=composition,
            composition_only=composition_only,
            head_dropout=head_dropout,
            average_strands=average_strands,
            chunk_length=chunk_length,
            chunk_offload=chunk_offload,
            chunk_kept=chunk_kept,
            members=members,
            **training,
        )
        self.labels = list(labels)
        self.patch = patch
        self.average_strands = average_strands
        self.chunk_length, self.chunk_offload, self.chunk_kept = chunk_length, chunk_offload, chunk_kept

        config = self.backbone_config
        if patch > 1 and config.reverse_complement:
            raise UserError(
                "model.patch must be 1 with backbone.reverse_complement: patches of the strands do not align"
            )
        if patch > 1 and (motif or motif_layers or positions):
            raise UserError(
                "model.motif, model.motif_layers and model.positions must be 0 with model.patch: "
                "its positions are means"
            )
        if pool_bins < 1:
            raise UserError(f"model.pool_bins is {pool_bins}: it must be at least 1")
        if pooling == "last" and pool_bins > 1:
            raise UserError("model.pool_bins must be 1 with model.pooling last: there is one last position")
        self.backbone = Backbone(config)
        if chunk_length:
            self._check_chunks(positions, standardize)
        self.embedding = SequenceEmbedding(
            config.d_model, kmer, motif, patch, positions, self.backbone.causal, standardize, motif_layers
        )
        self.pooling = Pooling(pooling, pool_bins, strands=config.reverse_complement)
        width = self.pooling.width * config.d_model
        self.standardize = nn.BatchNorm1d(width) if standardize else nn.Identity()
        self.head = nn.Sequential(nn.Dropout(head_dropout), nn.Linear(width, len(labels)))
        if not 0 <= composition <= 8:
            raise UserError(f"model.composition is {composition}: it must be 1 to 8 bases, or 0 for none")
        if composition_only and not composition:
            raise UserError("model.composition_only needs model.composition, the length of the k-mers that answer")
        self.composition = Composition(composition, len(labels)) if composition else None
        self.composition_only = composition_only
        if members < 1 or (members > 1 and composition):
            raise UserError(f"model.members is {members}: it must be at least 1, and 1 with model.composition")
        alike = {key: value for key, value in self._own_args.items() if key not in (*training, "members")}
        self.others = nn.ModuleList(DNANetwork(backbone=config, **alike) for _ in range(members - 1))
        if composition:  # what the network adds to it starts from nothing
            nn.init.zeros_(self.head[1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.head[1].bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Score sequences.

        Args:
            tokens: (b, l) uint8 token ids, padded on the right.
            lengths: (b,) real tokens of each sequence, at least 1.

        Returns:
            (b, c) float32 logits. Padding and neighbours in the batch do not change them.
        """
        if self.others:  # the logarithms of the members' mean probabilities
            every = self.member_logits(tokens, lengths).log_softmax(-1)
            return every.logsumexp(1) - math.log(every.shape[1])
        if self.composition is not None and self.composition_only:
            return self.composition(tokens, lengths)
        logits = self.score(self.pool(tokens, lengths))
        return logits if self.composition is None else logits + self.composition(tokens, lengths)

    def member_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(b, m, c) float32 logits of each member by itself; arguments as of :meth:`forward`."""
        if not self.others:
            return self(tokens, lengths)[:, None]
        own = self.score(self.pool(tokens, lengths))
        return torch.stack([own, *(other(tokens, lengths) for other in self.others)], dim=1)

    def pool(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(b, width) pooled outputs of the backbone, before the head; arguments as of :meth:`forward`."""
        if 0 < self.chunk_length < tokens.shape[1]:
            return self._pool_chunks(tokens, lengths)
        x = self.embedding(tokens, lengths)  # (b, l, d), l counting patches from here on
        if self.backbone_config.reverse_complement:
            other = self.embedding(tokens, lengths, other_strand=True)
            x = torch.cat([x, other], dim=-1)  # (b, l, 2d)
        lengths = -(-lengths // self.patch)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (b, l)
        # Padding precedes the real tokens of a backward scan: its own segment keeps it out of their state.
        seq_idx = None if self.backbone.causal or bool(real.all()) else (~real).to(torch.int32)
        y, _ = self.backbone(x, seq_idx=seq_idx)
        return self.pooling(y, lengths)

    def _pool_chunks(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        patches = -(-lengths // self.patch)
        wide = torch.promote_types(self.backbone.norm.weight.dtype, torch.float32)
        real = bool((lengths == tokens.shape[1]).all())

        def embed(start: int, stop: int) -> Tensor:
            return self.embedding.chunk(tokens, lengths, start * self.patch, stop * self.patch)

        gathered, _ = fold_backbone(
            self.backbone,
            embed,
            lambda gathered, y, start: self.pooling.update(gathered, y, patches, start, real),
            self.pooling.start(patches, self.backbone_config.d_model, wide),
            length=-(-tokens.shape[1] // self.patch),
            chunk_length=self.chunk_length // self.patch,
            modules=[self.embedding],
            offload=self.chunk_offload,
            kept=self.chunk_kept,
        )
        return self.pooling.finish(gathered, patches, wide)

    def _check_chunks(self, positions: int, standardize: bool) -> None:
        if self.chunk_length < 0 or self.chunk_length % self.patch:
            raise UserError(
                f"model.chunk_length is {self.chunk_length}: give a multiple of model.patch ({self.patch}), or 0"
            )
        if self.chunk_kept < 0:
            raise UserError(f"model.chunk_kept is {self.chunk_kept}: give the number of chunks, 0 or more")
        if positions or standardize:
            raise UserError(
                "model.chunk_length cannot go with model.positions, which are for short windows, nor with "
                "model.standardize, which needs statistics of the whole window before its first chunk: leave one out"
            )
        check_chunkable(self.backbone, self.chunk_length // self.patch, "model.chunk_length")

    def score(self, pooled: Tensor) -> Tensor:
        """(b, width · d) pooled vectors to (b, c) logits, never in 16 bit; without those of ``composition``."""
        if self.composition_only:
            return pooled.new_zeros(len(pooled), len(self.labels), dtype=torch.float32)
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            return self.head(self.standardize(pooled))

    def check_unaligned(self) -> None:
        """Raise UserError where the model can only say something of whole, aligned windows."""
        self.check_single()
        if self.pooling.bins > 1 or self.embedding.places is not None:
            raise UserError(
                "this model answers for whole, aligned windows (a site and what is around it) and says nothing of a "
                "place in a long sequence: classify such windows one by one, or take a checkpoint for long sequences "
                "(`seqssm checkpoints` lists them), or train one with model.pool_bins: 1 and model.positions: 0"
            )

    def check_single(self) -> None:
        """Raise UserError where several networks answer together, which is for windows that are run whole."""
        if self.others:
            raise UserError("this works with one network, and this model has several (model.members): train one with 1")

    def predict_proba(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(b, c) float32 probabilities, averaged over both strands if the task says so."""
        probabilities = self(tokens, lengths).softmax(-1)
        if self.average_strands and not self.backbone_config.reverse_complement:
            other = self(reverse_complement(tokens, lengths), lengths).softmax(-1)
            probabilities = (probabilities + other) / 2
        return probabilities

    def predict(
        self,
        source: str | Path | Sequence[str],
        *,
        window_bp: int | None = None,
        stride_bp: int | None = None,
        batch_size: int = 8,
    ) -> list[LabelledWindow]:
        """Label sequences, or the windows of a sequence file.

        Args:
            source: a sequence in IUPAC letters, several of them, or the path of a file: FASTA (also gz, bgzip),
                GenBank, EMBL, 2bit. Text of IUPAC letters alone is a sequence; a ``Path`` is always a file.
            window_bp: bases a window of a file; as trained by default, 0 for whole records. A sequence is one window.
            stride_bp: bases between window starts; the window by default.
            batch_size: windows a forward pass.

        Returns:
            A row a window, in order; sequences are called ``sequence 1`` and so on.

        Raises:
            UserError: a file cannot be read, or a sequence holds other letters.
        """
        if not isinstance(source, Path | str | list | tuple):
            raise UserError(
                f"cannot read a {type(source).__name__}: give a sequence, a list of sequences, or the path of a file"
            )
        if source == "":
            raise UserError("the sequence is empty: give IUPAC letters, or the path of a file")
        if isinstance(source, Path) or (isinstance(source, str) and not is_sequence(source)):
            trained_bp = self.trained_on.get("window_bp")
            window_bp = (trained_bp if window_bp is None else window_bp) or None
            windows: Iterable[FastaWindow] = FastaWindows(source, window_bp, stride_bp)
        else:
            windows = sequence_windows([source] if isinstance(source, str) else source)
        return list(self.label_windows(windows, batch_size))

    def label_windows(self, windows: Iterable[FastaWindow], batch_size: int = 8) -> Iterator[LabelledWindow]:
        """Label windows as they come, ``batch_size`` at once.

        Raises:
            UserError: the model was made for aligned windows, and one is longer than these.
        """
        device = self.device
        for group, batch in window_batches(windows, batch_size):
            self._check_fits(group)
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, device.type == "cuda"):
                rows = self.predict_proba(batch.tokens.to(device), batch.lengths.to(device)).float().cpu()
            for window, row in zip(group, rows, strict=True):
                where = (window.record, window.start_bp, window.end_bp)
                if window.n_fraction < 1:
                    yield LabelledWindow(*where, self.labels[int(row.argmax())], row.tolist())
                else:  # a window of nothing but N holds no evidence
                    yield LabelledWindow(*where, None, None)

    def _check_fits(self, windows: Sequence[FastaWindow]) -> None:
        places = self.embedding.places
        if places is None:
            return
        for window in windows:
            length = window.end_bp - window.start_bp
            if length > len(places):
                raise UserError(
                    f"{window.record}: {length:,} bp, and this model answers for aligned windows of up to "
                    f"{len(places)} bp (a site and what is around it): cut the sequences to such windows, or go along "
                    f"them with --window-bp {len(places)}; for long sequences take another checkpoint "
                    "(`seqssm checkpoints` lists them)"
                )

    def probe(self, seed: int = 0) -> Tensor:
        places = self.embedding.places
        length = 1000 if places is None else len(places)
        tokens = torch.randint(4, (8, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            return self.predict_proba(tokens, torch.full((8,), length))
