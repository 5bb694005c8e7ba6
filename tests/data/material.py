"""Texts, and small stand-ins for the models and lists that recipes read."""

import json
import struct
from pathlib import Path

import numpy as np

from data.config import Asset, Assets

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
    """A fastText model (fastText's format, version 12) in which every word of a text votes for its
    label.

    Written by hand: training in the wheel that datatrove asks for ends in "Encountered NaN".
    """
    words = {word: place for place, text in enumerate(texts.values()) for word in text.split()}
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


def make_assets(home: Path) -> Assets:
    """A model that knows English from German, one that knows mathematics, a short block list, an
    evaluation.
    """
    home.mkdir(parents=True, exist_ok=True)
    write_model(home / "lid.bin", {"en": PROSE, "de": GERMAN})
    write_model(home / "math.bin", {"math": SUMS, "other": SHOP})
    (home / "domains").write_text("casino-lists.com\n")
    (home / "evaluations.jsonl").write_text(json.dumps({"question": QUESTION, "answer": 7}) + "\n")
    paths = (home / name for name in ("lid.bin", "math.bin", "domains", "evaluations.jsonl"))
    return Assets(*(Asset(str(path)) for path in paths))
