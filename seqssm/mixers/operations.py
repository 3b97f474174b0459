"""What mixers run along the length: the kernels themselves, or what takes their place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqssm.errors import UserError
from seqssm.kernels.causal_conv1d.op import causal_conv1d
from seqssm.kernels.selective_scan.op import selective_scan
from seqssm.kernels.selective_scan.part import Join
from seqssm.kernels.ssd.op import ssd


class Operations:
    """Everything that moves along the sequence in a mixer, for sequences that are whole in this process.

    A mixer calls these and nothing else that looks from one token to another, so that an object with the same methods
    can stand in for them: :class:`seqssm.longcontext.parallel.SplitOperations` runs them over a sequence whose parts
    lie in several processes, of which the mixer then knows nothing.
    """

    split = False
    """Whether the tokens are a part of a longer sequence. :meth:`enter` then says what comes before them."""

    causal_conv1d = staticmethod(causal_conv1d)
    selective_scan = staticmethod(selective_scan)
    ssd = staticmethod(ssd)

    def enter(
        self, end: Tensor, decay: Tensor, *, seq_idx: Tensor | None = None, reverse: bool | Sequence[bool] = False
    ) -> Tensor:
        """The state that enters this part of the sequence, for a recurrence that is linear in its state.

        Args:
            end: (b, c, ...) the state after this part when it starts from zero, real or complex.
            decay: of ``end``'s shape or one that broadcasts to it: what the part multiplies a state by.
            seq_idx: (b, l) of this part, as the kernels take it. Resets within the part are ``decay``'s to tell; a
                change of the index where two parts meet lets nothing through.
            reverse: whether the part is read from its last token to its first; one for each of as many equal parts of
                the channels c.

        Returns:
            (b, c, ...), with gradients.
        """
        raise NotImplementedError("a whole sequence starts from the state that the caller gives")

    def before(self, x: Tensor, count: int, *, seq_idx: Tensor | None = None, reverse: bool = False) -> Tensor:
        """The last ``count`` tokens before this part in reading order, x (b, l, d) -> (b, count, d), oldest first.

        Zeros where there are none, or where a change of ``seq_idx`` lies between.
        """
        raise NotImplementedError("nothing comes before a whole sequence")

    def join(self, seq_idx: Tensor | None, reverse: Sequence[bool]) -> Join | None:
        """What tells the Triton scan of a part the state that enters it; None for whole sequences.

        Args:
            seq_idx: (b, l) of this part.
            reverse: one direction a group.
        """
        return None


WHOLE = Operations()


def check_halo(tokens: int, halo: int) -> None:
    """Refuse a part of a sequence that has fewer tokens than a convolution takes from before it."""
    if tokens < halo:
        raise UserError(
            f"a part of {tokens} tokens is shorter than the convolution's window of {halo + 1}: "
            "split the length over fewer processes"
        )
