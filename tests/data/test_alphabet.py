import numpy as np
import pytest
import torch
from Bio.Seq import Seq

from seqssm.data.dna.alphabet import INVALID, IUPAC_LETTERS, PAD, complement, decode, encode, reverse_complement


def test_letters_become_tokens_whatever_their_case() -> None:
    assert encode("ACGTNacgtnUu").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 3]
    assert set(encode("RYSWKMBDHVryswkmbdhv").tolist()) == {4}
    assert decode(encode("acgtR")) == "ACGTN"


def test_a_letter_outside_iupac_is_refused_by_position() -> None:
    with pytest.raises(ValueError, match="'E' at position 3 "):
        encode("ACEG")
    with pytest.raises(ValueError, match="'-' at position 1 "):
        encode(b"-A")


def test_every_byte_is_a_base_an_ambiguity_or_invalid() -> None:
    from seqssm.data.dna.alphabet import ENCODE

    valid = np.flatnonzero(ENCODE != INVALID)
    assert sorted(valid.tolist()) == sorted(IUPAC_LETTERS)


@pytest.mark.parametrize("letters", ["A", "GATTACA", "ACGTNNRYKM"])
def test_reverse_complement_is_biopythons(letters: str) -> None:
    tokens = torch.from_numpy(encode(letters))[None]
    assert decode(reverse_complement(tokens)[0]) == decode(encode(str(Seq(letters).reverse_complement())))


def test_reverse_complement_keeps_padding_on_the_right_and_undoes_itself() -> None:
    rows = ["ACGTT", "GGA", "N"]
    lengths = torch.tensor([5, 3, 1])
    tokens = torch.full((3, 5), PAD, dtype=torch.uint8)
    for row, letters in zip(tokens, rows, strict=True):
        row[: len(letters)] = torch.from_numpy(encode(letters))
    turned = reverse_complement(tokens, lengths)
    assert [decode(row) for row in turned] == ["AACGT", "TCC..", "N...."]
    assert torch.equal(reverse_complement(turned, lengths), tokens)
    assert turned.dtype == torch.uint8


def test_complement_leaves_special_tokens() -> None:
    tokens = torch.arange(8)
    assert complement(tokens).tolist() == [3, 2, 1, 0, 4, 5, 6, 7]
