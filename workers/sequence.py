"""Tools over biological sequences, by Biopython."""

from __future__ import annotations

from io import StringIO
from typing import Annotated, Any, Final, Literal

from Bio import Align, Seq, SeqIO
from Bio.Data import CodonTable
from pydantic import Field
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

from mcp_broker.worker import InvalidArgument, tool

# Biopython ships types for some of its functions only
_sequence: Final[Any] = Seq.Seq
_parse: Final[Any] = SeqIO.parse
_aligner: Final[Any] = Align.PairwiseAligner

#: the IUPAC letters of nucleotides, and a gap
_NUCLEOTIDES = frozenset("ACGTUNRYSWKMBDHV-")
#: letters that count as G or C (S is "G or C"), and those that count at all
_STRONG = frozenset("GCS")
_KNOWN = frozenset("ACGTUSW")
#: an alignment takes time and memory by the product of the lengths: about a second
_CELLS_MAX = 25_000_000
_NAMES_MAX = 100

Letters = Annotated[str, Field(min_length=1, max_length=1_000_000)]


class FastaStatistics(TypedDict):
    """What a FASTA text holds."""

    #: records
    count: int
    total_length: int
    shortest: int
    longest: int
    mean_length: float
    #: half of all letters are in sequences at least this long
    n50: int
    #: G and C among the unambiguous nucleotides, 0 to 1; null where the text is protein
    gc_fraction: float | None
    #: of the first 100 records, in order: name -> length
    lengths: dict[str, int]


class Alignment(TypedDict):
    """The best pairwise alignment."""

    score: float
    #: columns in which both letters are the same
    identities: int
    gaps: int
    #: for people: the two sequences, one under the other
    text: str


@tool(name="sequence.fasta_statistics", idempotent=True, timeout_s=30, category="biology", tags=("example",))
def fasta_statistics(fasta: Annotated[str, Field(max_length=1_000_000)]) -> FastaStatistics:
    """Count and measure the sequences of a FASTA text: lengths, N50, and the share of G and C.

    Case does not count. `gc_fraction` is null when a letter is no nucleotide's.
    """
    lengths: list[int] = []
    names: dict[str, int] = {}
    strong = known = 0
    is_nucleotide = True
    try:
        for record in _parse(StringIO(fasta), "fasta"):
            letters = str(record.seq).upper()
            lengths.append(len(letters))
            if len(names) < _NAMES_MAX:
                names.setdefault(record.id, len(letters))
            is_nucleotide = is_nucleotide and _NUCLEOTIDES.issuperset(letters)
            strong += sum(map(letters.count, _STRONG))
            known += sum(map(letters.count, _KNOWN))
    except ValueError as error:
        raise _refusal("fasta_statistics", "fasta", "a FASTA text", str(error)) from error
    if not lengths:
        raise _refusal("fasta_statistics", "fasta", "a FASTA text", "it holds no record; one starts with '>'")
    return {
        "count": len(lengths),
        "total_length": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "n50": _n50(lengths),
        "gc_fraction": strong / known if is_nucleotide and known else None,
        "lengths": names,
    }


@tool(name="sequence.translate", idempotent=True, timeout_s=10, category="biology", tags=("example",))
def translate(
    sequence: Letters,
    table: Annotated[int, Field(ge=1)] = 1,
    frame: Annotated[int, Field(ge=1, le=3)] = 1,
    to_stop: bool = False,
) -> str:
    """Translate DNA or RNA into protein letters.

    `table` is NCBI's number of the genetic code (1 is the standard one), `frame` the letter to start at. Stops are `*`;
    with `to_stop` the protein ends before the first one. Letters after the last whole codon are left out.
    """
    letters = _nucleotides("translate", sequence)[frame - 1 :]
    whole = letters[: len(letters) // 3 * 3]
    if table not in CodonTable.ambiguous_generic_by_id:
        known = ", ".join(str(number) for number in sorted(CodonTable.ambiguous_generic_by_id))
        raise _refusal("translate", "table", f"one of {known}", f"there is no genetic code {table}")
    try:
        return str(_sequence(whole).translate(table=table, to_stop=to_stop))
    except CodonTable.TranslationError as error:
        raise _refusal("translate", "sequence", "codons", str(error)) from error


@tool(
    name="sequence.reverse_complement", idempotent=True, timeout_s=10, category="biology", tags=("example",)
)
def reverse_complement(sequence: Letters) -> str:
    """Return the other strand, read backwards. RNA (with U and no T) stays RNA; case is kept."""
    letters = _nucleotides("reverse_complement", sequence)
    strand = _sequence("".join(sequence.split()))
    is_rna = "U" in letters and "T" not in letters
    return str(strand.reverse_complement_rna() if is_rna else strand.reverse_complement())


@tool(name="sequence.align", idempotent=True, timeout_s=30, category="biology", tags=("example",))
def align(  # noqa: PLR0917 (arguments go by name)
    first: Annotated[str, Field(min_length=1, max_length=100_000)],
    second: Annotated[str, Field(min_length=1, max_length=100_000)],
    mode: Literal["global", "local"] = "global",
    match: float = 1.0,
    mismatch: float = -1.0,
    gap_open: Annotated[float, Field(le=0)] = -2.0,
    gap_extend: Annotated[float, Field(le=0)] = -0.5,
) -> Alignment:
    """Align two sequences and return the best alignment with its score.

    `global` aligns them from end to end, `local` finds their most similar part. Case does not count. Of several
    equally good alignments it returns one. The product of the two lengths may be 25 million at most.
    """
    if len(first) * len(second) > _CELLS_MAX:
        why = f"the product of the lengths, {len(first)} and {len(second)}, is over {_CELLS_MAX}"
        raise _refusal("align", "second", "shorter sequences", why)
    aligner = _aligner(
        mode=mode,
        match_score=match,
        mismatch_score=mismatch,
        open_gap_score=gap_open,
        extend_gap_score=gap_extend,
    )
    found = aligner.align("".join(first.upper().split()), "".join(second.upper().split()))
    best = next(iter(found), None)
    if best is None:
        # a local alignment of sequences without a letter in common
        return {"score": 0.0, "identities": 0, "gaps": 0, "text": ""}
    counts = best.counts()
    return {
        "score": float(best.score),
        "identities": counts.identities,
        "gaps": counts.gaps,
        "text": str(best),
    }


def _n50(lengths: list[int]) -> int:
    half = sum(lengths) / 2
    reached = 0
    for length in sorted(lengths, reverse=True):
        reached += length
        if reached >= half:
            return length
    return 0


def _nucleotides(name: str, sequence: str) -> str:
    letters = "".join(sequence.upper().split())
    wrong = sorted(set(letters) - _NUCLEOTIDES)
    if wrong:
        raise _refusal(name, "sequence", "nucleotide letters", f"it holds {', '.join(map(repr, wrong[:5]))}")
    return letters


def _refusal(name: str, argument: str, expected: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"sequence.{name}: argument '{argument}': expected {expected}: {why}",
        {"faults": [{"path": f"/{argument}", "expected": expected, "message": why}]},
    )
