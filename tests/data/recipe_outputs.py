"""What recipes, passes and sharding put out for a fixed input, as hashes beside their versions.

python -m tests.data.recipe_outputs    # write recipe_outputs.json anew, after a version was raised
"""

import gzip
import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data import tokenizer
from data.config import Assets, Source
from data.pipeline import clean, fingerprints, megatron, shard
from data.pipeline.clean import Build
from data.pipeline.shard import Clean, Sharding
from data.recipes.readers import pin_files, raw_files
from examples.demo_corpus.archives import write_archive
from tests.data.material import GERMAN, PROSE, QUESTION, SHOP, SUMS, make_assets, write_rows

HERE = Path(__file__).resolve().parent
RECORD = HERE / "recipe_outputs.json"
VOCABULARY = HERE.parent / "fixtures" / "prepared" / "tokenizer" / "tokenizer.json"
CODE = "def area(width, height):\n    return width * height  # of a rectangle\n" * 4
TEX = f"\\documentclass{{a}}\n\\section{{Rivers}}\n{PROSE}% note\n5\\% of it.\n\\bibliography{{b}}"
STORY = f"""{PROSE}

 12

The miller, an old man, kept his wheel turn-
ing through every winter that anybody could remember, and sold flour to six villages. His daughter wrote the
accounts. When the railway came, she bought two waggons, hired a clerk from Leeds, and opened a shop near the
station, where farmers, sailors and schoolchildren could buy bread, rope, paper, ink and lamps at fair prices.

iv

Nobody was surprised, therefore, that the council asked her, in the year of the great flood, to lead the works
on the dam; nor that she refused to take any pay for it until the last stone had been laid.

The canal, which the boatmen had dug to the lake in the time of the old miller, froze early that year, and
skaters in red scarves carried the post from bridge to bridge; letters that had taken two days arrived before noon."""
LONG = "about the river and the fields that lie on both of its sides in spring"
PAGE = (
    f"<html><head><title>Rivers</title></head><body><nav>Home</nav><article><p>{PROSE}</p><p>Its fish are sold on the "
    "market of the town, on Fridays.</p><p>3 likes</p></article></body></html>"
)
SECOND = PROSE.replace("river", "canal").replace("sea", "lake").replace("farmers", "boatmen")
ROWS: dict[str, list[dict[str, Any]]] = {
    "books": [
        {
            "text": f"*** START OF THE PROJECT GUTENBERG EBOOK R ***\n{STORY}",
            "id": "b",
        }
    ],
    "curated": [{"text": PROSE}, {"text": SECOND, "group": "g"}, {"text": "1 2 3 " * 90}],
    "forums": [
        {"thread": "t", "id": "q", "title": "Rivers", "text": f"Question {LONG}", "created": 1, "author": "ann"},
        {"thread": "t", "id": "b", "parent": "q", "text": f"Second {LONG}", "created": 9},
        {"thread": "t", "id": "a", "parent": "q", "text": f"First {LONG}", "created": 3},
    ],
    "instructions": [
        {"messages": [{"role": "user", "content": "A river?"}, {"role": "assistant", "content": "The Oder."}]},
        {"instruction": "Name a river.", "input": "In Spain.", "output": "The Ebro."},
        {"question": "And a sea?", "answer": "The Baltic."},
    ],
    "mathematics": [{"text": 3 * SUMS}, {"text": 3 * SHOP}],
    "source_code": [
        {"text": CODE, "license": "MIT", "repo_name": "ann/area"},
        {"text": "# do not edit\n" + CODE, "license": "MIT"},
    ],
    "synthetic": [{"text": PROSE}, {"text": "As an AI language model, I like rivers. " + PROSE}],
    "technical": [{"text": TEX}, {"text": f"Rivers\n\n{PROSE}\n\nReferences\n[1] A. Author, 1999.\n"}],
}


def sources(home: Path) -> dict[str, Source]:
    """A source for every recipe, by its name, and one that asks for every pass."""
    found = {}
    for name, rows in ROWS.items():
        licence = "permissive" if name == "source_code" else "CC0-1.0"
        found[name] = Source(name, str(home / name), licence, 1.0, 1)
        write_rows(home / name / "0.jsonl", rows)
    pages = {"1": PAGE, "2": PAGE.replace(PROSE, 3 * GERMAN), "3": PAGE.replace(PROSE, SECOND)}
    (home / "web").mkdir()
    with (home / "web" / "0.warc.gz").open("wb") as file:
        write_archive(file, ((f"http://a.invalid/{name}", page) for name, page in pages.items()))
    found["web"] = Source("web", str(home / "web"), "CC0-1.0", 1.0, 1)
    found["manuals"] = Source("manuals", str(home / "pages"), "CC0-1.0", 1.0, 1)
    (home / "pages").mkdir()
    for name, page in pages.items():
        (home / "pages" / f"{name}.html").write_text(page)
    rows = [{"text": f"{text} {tail}"} for text in (PROSE, SECOND) for tail in ("One.", "Two.", f"{LONG} {LONG}.")]
    rows += [{"text": f"{3 * SHOP} {QUESTION}"}, {"text": f"{SUMS} mail ann@corp.org {PROSE[50:]} {LONG}"}]
    write_rows(home / "passes" / "0.jsonl", rows)
    found["passes"] = Source(
        "curated", str(home / "passes"), "CC0-1.0", 1.0, 1,
        near_duplicates="14x8", exact_substrings=20, replace_pii=True, decontaminate=True,
    )  # fmt: skip
    return found


def clean_documents(source: Source, place: Path, assets: Assets) -> list[bytes]:
    """The lines that all passes of a source end in."""
    place.mkdir(parents=True)
    kind, files = raw_files(source.input)
    pin_files(place, kind, list(files))
    build = Build(source, assets, place, keep_exclusions=False)
    for one in clean.passes(build):
        for function, *arguments in one.jobs():
            function(*arguments)
    clean.finish(build)
    return [
        line for path in sorted(place.glob("*.jsonl.gz")) for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


def megatron_shards(home: Path) -> list[bytes]:
    """The shards of sixty tokenized documents, which megatron-core wrote."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    (home / "raw").mkdir(parents=True)
    builder = IndexedDatasetBuilder(str(home / "raw" / "a.bin"))
    for number in range(60):
        builder.add_item(torch.arange(12, 20 + number))
        builder.end_document()
    builder.finalize(str(home / "raw" / "a.idx"))
    (home / "shards").mkdir()
    job = megatron.Corpus(str(home / "raw"), ["a.idx"], home / "shards", 300, 1)
    megatron.shard_task(job, 50.0, 0)
    return [path.read_bytes() for path in sorted((home / "shards").glob("*.ds*"))]


def sharded(clean: Path, files: list[str], documents: int, place: Path) -> list[bytes]:
    """The shards of a source's clean documents, by a vocabulary that is kept."""
    place.mkdir()
    job = Sharding(Clean(clean, files, documents), place, VOCABULARY, 3, 50.0, 1)
    shard.shard_task(job, 0)
    return [path.read_bytes() for path in sorted(place.glob("*.ds*"))]


def outputs(home: Path) -> dict[str, dict[str, Any]]:
    """Versions, and SHA-256 of what comes out, of every recipe, the passes, sharding and a vocabulary's training."""
    assets = make_assets(home)
    found: dict[str, dict[str, Any]] = {}
    for name, source in sources(home / "raw").items():
        lines = clean_documents(source, home / "clean" / name, assets)
        found[name] = {"versions": fingerprints.versions_of(source), "documents": len(lines), "sha256": digest(lines)}
    found["megatron"] = {
        "versions": {"megatron": megatron.RECIPE_VERSION},
        "sha256": digest(megatron_shards(home / "megatron")),
    }
    shards = sharded(home / "clean" / "passes", ["00000.jsonl.gz"], found["passes"]["documents"], home / "shards-1")
    found["sharding"] = {"versions": {"sharding": shard.VERSION}, "sha256": digest(shards)}
    tokenizer.train([PROSE, SECOND, CODE, SUMS], 300, home / "vocabulary")
    vocabulary = {"training": tokenizer.TRAINING_VERSION, "tokenizers": version("tokenizers")}
    trained = digest([(home / "vocabulary" / tokenizer.FILE).read_bytes()])
    found["vocabulary"] = {"versions": vocabulary, "sha256": trained}
    return found


def digest(parts: list[bytes]) -> str:
    """SHA-256 of parts, with their borders."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        RECORD.write_text(json.dumps(outputs(Path(folder)), indent=1, sort_keys=True) + "\n")
    print(f"written to {RECORD}")
