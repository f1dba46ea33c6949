"""The sequence tools, called as functions and through their validation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker.errors import InvalidArgument

pytest.importorskip("Bio")
sequence = pytest.importorskip("mcp_broker_workers.sequence")


def test_fasta_is_counted_and_measured() -> None:
    told = sequence.fasta_statistics(">a one\nACGT\nacgt\n>b\nGGCC\n>c\nAT\n")
    assert told == {
        "count": 3,
        "total_length": 14,
        "shortest": 2,
        "longest": 8,
        "mean_length": 14 / 3,
        "n50": 8,
        "gc_fraction": 8 / 14,
        "lengths": {"a": 8, "b": 4, "c": 2},
    }


def test_unknown_letters_do_not_count_and_protein_has_no_gc() -> None:
    assert sequence.fasta_statistics(">a\nGCNNAT\n")["gc_fraction"] == 0.5
    assert sequence.fasta_statistics(">a\nMKLV\n")["gc_fraction"] is None
    assert sequence.fasta_statistics(">a\n")["gc_fraction"] is None


@pytest.mark.parametrize("fasta", ["", "ACGT", "no fasta at all\n>a\nACGT"])
def test_text_that_is_no_fasta_is_refused(fasta: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        sequence.fasta_statistics(fasta)
    assert refused.value.details["faults"][0]["path"] == "/fasta"


@pytest.mark.parametrize(
    ("settings", "protein"),
    [
        ({"sequence": "ATGGCCTAAGG"}, "MA*"),
        ({"sequence": "auggcc uaa"}, "MA*"),
        ({"sequence": "ATGGCCTAAATG", "to_stop": True}, "MA"),
        ({"sequence": "CATGGCC", "frame": 2}, "MA"),
        ({"sequence": "ATA", "table": 2}, "M"),
        ({"sequence": "AT"}, ""),
        ({"sequence": "NNN"}, "X"),
    ],
)
def test_codons_are_translated(settings: dict[str, Any], protein: str) -> None:
    assert sequence.translate(**sequence.translate.validate(settings)) == protein


def test_translation_refuses_protein_and_unknown_codes() -> None:
    with pytest.raises(InvalidArgument, match="'E', 'F'"):
        sequence.translate("FEE")
    with pytest.raises(InvalidArgument, match="no genetic code 99"):
        sequence.translate("ATG", table=99)


def test_other_strand_is_read_backwards() -> None:
    assert sequence.reverse_complement("AACg") == "cGTT"
    assert sequence.reverse_complement("AUGC") == "GCAU"


@given(st.text("ACGTNRYKM", min_size=1, max_size=60))
def test_other_strand_of_the_other_strand_is_the_first(letters: str) -> None:
    assert sequence.reverse_complement(sequence.reverse_complement(letters)) == letters


def test_alignment_has_score_identities_gaps_and_text() -> None:
    told = sequence.align("GATTACA", "gataca")
    assert (told["score"], told["identities"], told["gaps"]) == (4.0, 6, 1)
    assert "GATTACA" in told["text"]
    local = sequence.align("TTTTGATTACATTTT", "CCGATTACACC", mode="local")
    assert local["identities"] == 7
    assert sequence.align("AAA", "CCC", mode="local")["text"] == ""


def test_alignment_is_bounded() -> None:
    with pytest.raises(InvalidArgument, match="25000000"):
        sequence.align("A" * 10_000, "A" * 10_000)
    with pytest.raises(InvalidArgument):
        sequence.align.validate({"first": "A", "second": "A", "mode": "other"})
