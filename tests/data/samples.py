"""Sample texts, small models and lists as assets of recipes, and a run of one recipe."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np

from data.config import Asset, Assets, Source
from data.pipeline import accounting, clean
from data.pipeline.clean import Build
from data.readers.listing import list_raw_files, pin_files

NO_ASSETS = Assets()
PROSE = (
    "The river rises in the hills to the north of the town and runs, with many turns, to the "
    "sea. In the spring it carries the snow of the mountains, and the fields on both sides have "
    "to be kept dry with ditches that the farmers dig and clean together. Nobody who has seen "
    "the water that comes in a wet year would call this work idle. "
)
GERMAN = "Der Fluss entspringt in den Bergen und die Leute der Stadt haben ihn nicht vergessen. "
SUMS = (
    "let x be a real number such that the equation holds then the proof follows by induction on n. "
)
SHOP = (
    "buy cheap shoes now and save money with our best offers of the week in every shop near you "
    "today. "
)
QUESTION = (
    "What do the farmers dig together to keep the fields on both sides of the river dry in a wet "
    "year?"
)


def write_rows(path: Path, rows: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(path: Path, texts: dict[str, str]) -> None:
    """Write a fastText model (format version 12) in which each word votes for its text's label.

    `texts`: label to text. Written by hand, since training in the wheel that datatrove requires
    ends in "Encountered NaN".
    """
    words = {word: label for label, text in enumerate(texts.values()) for word in text.split()}
    size = len(texts)
    # dim, ..., loss softmax, model supervised, no n-grams
    settings = (size, 5, 5, 1, 5, 1, 3, 3, 0, 0, 0, 100)
    out = struct.pack("<2i12id", 793712314, 12, *settings, 1e-4)
    out += struct.pack("<3i2q", len(words) + size, len(words), size, len(words), -1)
    for word in words:
        out += word.encode() + b"\0" + struct.pack("<qb", 1, 0)
    for label in texts:
        out += f"__label__{label}".encode() + b"\0" + struct.pack("<qb", 1, 1)
    vectors = np.zeros((len(words), size), "<f4")
    vectors[np.arange(len(words)), list(words.values())] = 1
    for matrix in (vectors, 8 * np.eye(size, dtype="<f4")):
        out += struct.pack("<?2q", False, *matrix.shape) + matrix.tobytes()
    path.write_bytes(out)


def make_assets(folder: Path) -> Assets:
    """Write a language model, a mathematics classifier, a block list and an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "lid.bin", {"en": PROSE, "de": GERMAN})
    write_model(folder / "math.bin", {"math": SUMS, "other": SHOP})
    (folder / "domains").write_text("casino-lists.com\n")
    write_rows(folder / "evaluations.jsonl", [{"question": QUESTION, "answer": 7}])
    return Assets(
        language_model=Asset(str(folder / "lid.bin")),
        math_classifier=Asset(str(folder / "math.bin")),
        url_blocklist=Asset(str(folder / "domains")),
        evaluations=Asset(str(folder / "evaluations.jsonl")),
    )


def make_source(recipe: str, folder: Path, tasks: int = 1) -> Source:
    return Source(recipe, str(folder), "CC0-1.0", 1.0, tasks)


def pin_input(source: Source, build_dir: Path) -> Path:
    """Pin the input files of a build, as data/prepare.py does."""
    build_dir.mkdir(exist_ok=True)
    pin_files(build_dir, list_raw_files(source.input))
    return build_dir


def read_clean_rows(build_dir: Path) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for path in sorted((build_dir / "documents" / "clean").glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


def run_recipe(
    source: Source, build_dir: Path, assets: Assets = NO_ASSETS
) -> tuple[list[dict[str, str]], list[accounting.StepCounts]]:
    """Return the clean documents of a source and the counts of its steps."""
    pin_input(source, build_dir)
    for rank in range(source.tasks):
        clean.clean_task(Build(source, assets, build_dir, True), rank)
    counts = accounting.read_counts(build_dir / "logs" / "clean" / "stats", source.tasks)
    return read_clean_rows(build_dir), counts
