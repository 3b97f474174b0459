"""Nucleotides as small integers: A 0, C 1, G 2, T 3, N 4, and the special tokens PAD 5 and MASK 6.

A letter of the IUPAC code that names more than one base becomes N, U becomes T, and case is ignored.
The code is that of Cornish-Bowden, Nucleic Acids Research 13, 3021 (1985).
"""

import numpy as np
import torch
from torch import Tensor

A, C, G, T, N, PAD, MASK = range(7)
VOCABULARY_SIZE = 8  # one id is spare, so that an embedding's rows are a power of two

LETTERS = "ACGTN"
IUPAC_LETTERS = b"ACGTUNRYSWKMBDHVacgtunryswkmbdhv"
INVALID = 255

ENCODE = np.full(256, INVALID, np.uint8)
ENCODE[np.frombuffer(IUPAC_LETTERS, np.uint8)] = N
for _token, _letters in enumerate((b"Aa", b"Cc", b"Gg", b"TtUu")):
    ENCODE[np.frombuffer(_letters, np.uint8)] = _token

COMPLEMENT = np.array([T, G, C, A, N, PAD, MASK, 7], np.uint8)
_DECODE = np.frombuffer(b"ACGTN.??", np.uint8)


def encode(letters: str | bytes) -> np.ndarray:
    """Tokens (l,) uint8 of a sequence of IUPAC letters; raises ValueError at any other letter."""
    raw = letters.encode("latin-1", "replace") if isinstance(letters, str) else letters
    tokens = ENCODE[np.frombuffer(raw, np.uint8)]
    if tokens.size and tokens.max() == INVALID:
        at = int(np.argmax(tokens == INVALID))
        raise ValueError(f"{chr(raw[at])!r} at position {at + 1} is not an IUPAC nucleotide letter")
    return tokens


def decode(tokens: np.ndarray | Tensor) -> str:
    """Letters of tokens (l,); padding prints as '.', masks as '?'."""
    return _DECODE[np.asarray(tokens)].tobytes().decode()


def complement(tokens: Tensor) -> Tensor:
    """Each base's complement, special tokens unchanged; any shape, any integer dtype."""
    # Arithmetic, where a table would need an index of 8 bytes a base: chromosomes pass through here.
    return torch.where(tokens <= T, T - tokens, tokens)


def reverse_complement(tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The other strand of every row of tokens (b,l), read 5' to 3'; right padding stays on the right.

    `lengths` (b,) counts each row's real tokens; None means that rows have no padding.
    """
    if lengths is None or bool((lengths == tokens.shape[1]).all()):
        return complement(tokens.flip(1))
    position = torch.arange(tokens.shape[1], device=tokens.device)  # (l,)
    source = lengths[:, None] - 1 - position  # (b,l), negative in the padding
    turned = complement(tokens.gather(1, source.clamp(min=0)))
    return torch.where(source >= 0, turned, PAD)
