"""Old identifiers and phrases do not come back: each has a term of the field in its place.

docs/pages/glossary.md lists the terms. A name is forbidden in code only; prose is checked for
phrases.
"""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "docs" / "pages" / "glossary.md"

# identifier -> the term that replaced it
OLD_NAMES = {
    "Exchange": "reduce_step_stats",
    "Guard": "FailurePolicy",
    "Lease": "RunLock",
    "Leave": "StopRequest",
    "Piece": "TensorShard",
    "Pieces": "CheckpointReader",
    "Pointers": "FakeDataPtr",
    "Rehearsed": "DryRunResult",
    "Silence": "NoOpCoalesced",
    "Told": "StepStats",
    "Turns": "InterleavedRunner",
    "calm": "updates_since_rollback",
    "cut_of": "shard_spec",
    "decays": "has_weight_decay",
    "document_starts": "find_doc_starts",
    "hopeless": "should_abort",
    "in_products": "is_matmul_weight",
    "in_step": "needs_equal_micro_batches",
    "lasting": "should_roll_back",
    "lay_out": "build_meta_model",
    "lockstep": "interleaved",
    "own_part": "attempt_store",
    "passed_over": "skipped_kernels",
    "raise_everywhere": "raise_on_all_ranks",
    "rewind": "rollback",
    "rewinds": "rollbacks",
    "rivals": "baselines",
    "scatter_sum": "reduce_scatter",
    "twin": "hf_model, hf_reference",
    "why_not": "unsupported_reason",
    "wishes": "flags",
}
# phrases that say nothing to a reader of another project
OLD_PHRASES = ("nobody's", "have met", "let go of", "it is behind it", "a doctor that falls ill")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def names(source: str) -> set[str]:
    """Identifiers of a Python file, strings and comments left out."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_old_identifiers_are_gone() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}, now {OLD_NAMES[name]}"
        for path in tracked("*.py")
        for name in names(path.read_text(encoding="utf-8")) & OLD_NAMES.keys()
    ]
    assert not found, "\n".join(sorted(found))


def test_old_phrases_are_gone() -> None:
    pages = [path for path in tracked("*.py", "*.md") if "docs/log" not in path.as_posix()]
    found = [
        f"{path.relative_to(ROOT)}: {phrase}"
        for path in pages
        if path != Path(__file__).resolve()
        for phrase in OLD_PHRASES
        if phrase in path.read_text(encoding="utf-8")
    ]
    assert not found, "\n".join(found)


def test_every_term_of_the_glossary_says_where_it_is_found() -> None:
    """Each row has a term, a meaning and paths that exist."""
    rows = re.findall(r"^\| (?!term|---)(.+?) \| (.+) \| (.+) \|$", GLOSSARY.read_text(), re.M)
    assert len(rows) > 60
    for term, meaning, where in rows:
        paths = re.findall(r"`([\w.-]+/[\w./-]*)`", where)
        assert meaning.strip() and paths, term
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert not missing, f"{term}: {missing}"


@pytest.mark.parametrize("source", ["def calm(): ...", "x.lasting", "f(rewinds=1)"])
def test_a_name_is_seen_wherever_it_is_written(source: str) -> None:
    assert names(source) & OLD_NAMES.keys()
