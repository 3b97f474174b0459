"""seqssm: Mamba state-space models for genomics and audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(checkpoint: str | Path, device: str = "cpu") -> Any:
    """A trained model that answers by ``.predict(...)``: DNA classifier, audio tagger or speech recogniser.

    Args:
        checkpoint: a shipped name (`seqssm checkpoints` lists them), a folder in hub format, or a Lightning ``.ckpt``.
        device: ``"cpu"``, ``"cuda"``, ...

    Returns:
        A :class:`~seqssm.tasks.dna_network.DNANetwork`, :class:`~seqssm.tasks.tagging_network.TaggingNetwork` or
        :class:`~seqssm.tasks.asr_network.ASRNetwork`, an ``nn.Module`` in evaluation mode. One that was pretrained
        without labels is its task, whose ``predict`` takes batches: start a training from it, or see its ``backbone``.

    Raises:
        seqssm.errors.UserError: there is no such checkpoint or device, or the checkpoint is damaged.
    """
    from seqssm.errors import UserError
    from seqssm.tasks.network import Network, load_network

    network = load_network(checkpoint, Network)
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without the device
        why = " ".join(str(error).splitlines()[:1])
        raise UserError(f"device {device!r} cannot be used here ({why}); choose cpu, or cuda on a GPU") from error
