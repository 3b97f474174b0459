"""Wrappers that read a sequence both ways, or both strands of a double helix."""

from __future__ import annotations

import torch
from torch import Tensor

from seqssm.errors import UserError
from seqssm.mixers.base import Mixer, Reading, State


class _TwoWay(Mixer):
    """A layer whose outputs depend on what follows, so that it has no state to carry."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.causal = False

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        raise UserError(NO_STATE)

    def step(self, x: Tensor, state: State) -> Tensor:
        raise UserError(NO_STATE)


NO_STATE = (
    "this model reads the sequence both ways, so it cannot carry a state from chunk to chunk; "
    "give it the whole sequence, or train one with bidirectional: none and reverse_complement: false"
)


class Bidirectional(_TwoWay):
    """Reads a sequence forward with one mixer and backward with another of its kind, and adds the two outputs.

    Tied, the directions share their input and output projections and have their own convolution and state space, as
    BiMamba in Caduceus (Schiff et al., 2024, section 3): nearly the size of one direction. Untied, they share nothing.
    No copy of the sequence is flipped; Mamba and Mamba2 run both directions in one launch.

    Args:
        forward_mixer, backward_mixer: two mixers of the same class and sizes.
        tied: drop the second one's projections and use the first one's.
    """

    def __init__(self, forward_mixer: Mixer, backward_mixer: Mixer, tied: bool) -> None:
        super().__init__(forward_mixer.d_model)
        self.forward_mixer = forward_mixer
        self.backward_mixer = backward_mixer
        if tied:
            for name in backward_mixer.shared_modules:
                delattr(backward_mixer, name)
                # Past nn.Module's own setter: a second registration would list the weights twice in the state dict.
                object.__setattr__(backward_mixer, name, getattr(forward_mixer, name))

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        return self.run_streams(None, x, seq_idx=seq_idx, reverse=reverse), _no_state(state)

    def readings(self, reverse: bool = False) -> list[Reading]:
        return [*self.forward_mixer.readings(reverse), *self.backward_mixer.readings(not reverse)]

    def run_streams(
        self,
        backward: Mixer | None,
        x: Tensor,
        *,
        strands: int = 1,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        return self.forward_mixer.run_streams(self.backward_mixer, x, strands=strands, seq_idx=seq_idx, reverse=reverse)


class ReverseComplement(_TwoWay):
    """Reads both strands of DNA with the same weights, each in its own direction: equivariant, exactly.

    x (b, l, 2d) holds, at each position, the features of the base and of its complement. The reverse complement of a
    sequence is x with its halves swapped and its length flipped; the output then is the output, swapped and flipped
    (Caduceus-PS: Schiff et al., 2024, section 4.2, with the strands kept in place and read the other way instead).

    Args:
        mixer: any mixer, also a :class:`Bidirectional`, of width d.
    """

    def __init__(self, mixer: Mixer) -> None:
        super().__init__(mixer.d_model)
        self.mixer = mixer

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        return self.mixer.run_streams(None, x, strands=2, seq_idx=seq_idx, reverse=reverse), _no_state(state)

    def readings(self, reverse: bool = False) -> list[Reading]:
        other = [reading._replace(strand=1) for reading in self.mixer.readings(not reverse)]
        return [*self.mixer.readings(reverse), *other]


def _no_state(state: State | None) -> State:
    if state:
        raise UserError(NO_STATE)
    return {}
