"""Hashes of what recipes, passes and sharding put out for a fixed input, and of their rules, beside
their versions.

python -m tests.data.recipe_outputs    # write recipe_outputs.json anew, after a version was raised

A fixed input shows only rules that it meets at their border, so the rules are hashed too: see
rules_of. Where the input itself has changed, other text says nothing about a recipe: change it in a
commit of its own.
"""

import dis
import gzip
import hashlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from datatrove.pipeline.base import PipelineStep

from data import recipes, tokenizer
from data.config import Source
from data.pipeline import clean, fingerprints, megatron, shard
from data.pipeline.clean import Build
from data.pipeline.shard import Clean, Sharding
from data.recipes.readers import pin_files, raw_files
from examples.demo_corpus.archives import write_archive
from tests.data.material import GERMAN, PROSE, QUESTION, SHOP, SUMS, make_assets, write_rows

NO_RULES = {"RECIPE_VERSION", "VERSION", "TRAINING_VERSION", "REQUIRES", "ASSETS"}
HERE = Path(__file__).resolve().parent
RECORD = HERE / "recipe_outputs.json"
VOCABULARY = HERE.parent / "fixtures" / "prepared" / "tokenizer" / "tokenizer.json"
CODE = "def area(width, height):\n    return width * height  # of a rectangle\n" * 4
LONG_LINE = 5 * CODE + 'names = "{}"\n'  # short on average
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
GUTENBERG = "*** {} OF THE PROJECT GUTENBERG EBOOK R ***"
LONG = "about the river and the fields that lie on both of its sides in spring"
PAGE = (
    f"<html><head><title>Rivers</title></head><body><nav>Home</nav><article><p>{PROSE}</p><p>Its "
    "fish are sold on the market of the town, on Fridays.</p><p>3 "
    "likes</p></article></body></html>"
)
NOTICES = "".join(
    f"<p>{line}</p>"
    for line in ("THE MILL", "1/2", "Rivers", "Sign in to see the map", "And read more")
)
CORRECTED = PAGE.replace(PROSE, STORY.replace("\n\n", "</p><p>")).replace("<p>3 likes</p>", NOTICES)
FURNITURE = PAGE.replace(
    "<p>3 likes</p>", "<p>3 likes</p><p>12 shares</p><p>4 comments</p><p>1,200 views</p>"
)
SECOND = PROSE.replace("river", "canal").replace("sea", "lake").replace("farmers", "boatmen")
PAGES = {
    "1": PAGE,
    "2": PAGE.replace(PROSE, 3 * GERMAN),
    "3": PAGE.replace(PROSE, SECOND),
    "4": CORRECTED,
    "5": FURNITURE,
    "6": re.sub(
        r"\b(and|of|to|that|with|have|be)\b", "his", PAGE
    ),  # one stop word, where the web asks for two
    "7": PAGE.replace(PROSE, 4 * f"{LONG}. "),
    "8": "<html><body></body></html>",
}
ADDRESSES = {f"http://a.invalid/{name}": page for name, page in PAGES.items()} | {
    "http://casino-lists.com/1": PAGE,
    "http://en.wikipedia.org/wiki/River": PAGE,
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "books": [
        {
            "text": f"{GUTENBERG.format('START')}\n{STORY}\n{GUTENBERG.format('END')}\nNo cost",
            "id": "b",
        },
        {"text": f"{GUTENBERG.format('START')}\n12\n{GUTENBERG.format('END')}"},
        {"text": PROSE},
        {"text": 4 * f"{PROSE}\n\n"},
    ],
    "curated": [
        {"text": PROSE},
        {"text": SECOND, "group": "g"},
        {"text": "1 2 3 " * 90},
        {"text": LONG},
        {"text": ""},
    ],
    "forums": [
        {
            "thread": "t",
            "id": "q",
            "title": "Rivers",
            "text": f"Question {LONG}",
            "created": 1,
            "author": "ann",
        },
        {"thread": "t", "id": "b", "parent": "q", "text": f"Second {LONG}", "created": 9},
        {"thread": "t", "id": "a", "parent": "q", "text": f"First {LONG}", "created": 3},
        {"thread": "t", "id": "d", "parent": "a", "text": "[deleted]", "created": 4},
        {
            "thread": "t",
            "id": "e",
            "parent": "d",
            "text": "Under it",
            "author": "[deleted]",
            "created": "5",
        },
        {
            "link_id": "t3_u",
            "name": "t1_x",
            "parent_id": "t1_y",
            "body": f"Circle {LONG}",
            "created_utc": 2,
        },
        {"link_id": "t3_u", "name": "t1_y", "parent_id": "t1_x", "body": f"Of parents {LONG}"},
        {
            "link_id": "t3_u",
            "name": "t1_z",
            "parent_id": "t1_gone",
            "body": "Orphan",
            "created_utc": 3,
        },
        {
            "id": "v",
            "title": "Nested",
            "messages": [{"id": 1, "text": LONG}, {"id": 2, "parent": 1, "text": LONG}],
        },
        {"thread": "t", "id": "z", "text": f"Too late {LONG}"},
        {"thread": "w", "id": "s", "text": "Short"},
        {"text": LONG},
    ],
    "instructions": [
        {
            "messages": [
                {"role": "user", "content": "A river?"},
                {"role": "assistant", "content": "The Oder."},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "A river in Asia?"},
                {"from": "gpt", "value": "The Indus."},
            ]
        },
        {"instruction": "Name a river.", "input": "In Spain.", "output": "The Ebro."},
        {"question": "And a sea?", "answer": "The Baltic."},
        {"prompt": "And a lake in the north?", "response": "The Ladoga."},
        {
            "messages": [
                {"role": "assistant", "content": "Which river?"},
                {"role": "user", "content": "The last one."},
            ]
        },
        {
            "messages": [
                {"role": "tool", "content": "The Oder is 840 km."},
                {"role": "assistant", "content": "840 km."},
            ]
        },
        {"prompt": "And a mountain in the north?", "response": " "},
        {"question": "A?", "answer": "B."},
    ],
    "mathematics": [
        {"text": 3 * SUMS},
        {"text": 3 * SHOP},
        {"text": "let x be"},
        {"text": SUMS + 2000 * "1 "},
    ],
    "source_code": [
        {"text": CODE, "license": "MIT", "repo_name": "ann/area"},
        {"text": "# do not edit\n" + CODE, "license": "MIT"},
        {"text": 12 * "\n" + "# do not edit\n" + CODE, "license": "MIT"},
        {"text": LONG_LINE.format(150 * "river "), "license": "MIT"},
        {"text": LONG_LINE.format(200 * "river "), "license": "MIT"},
        {"text": CODE.replace("of a rectangle", 20 * "of a rectangle "), "license": "MIT"},
        {"text": 30 * "a         \n", "license": "MIT"},
        {"text": 20 * "value = [1, 2, 3, 4]\n", "license": "MIT"},
        {"text": "area = width * height\n", "license": "MIT"},
        {"text": 2 * CODE, "licenses": ["Apache-2.0", "ISC"], "id": "two"},
        {"text": 2 * CODE, "licenses": ["MIT", "GPL-3.0"], "id": "copyleft"},
        {"text": 2 * CODE, "id": "unknown"},
    ],
    "synthetic": [
        {"text": PROSE},
        {"text": "As an AI language model, I like rivers. " + PROSE},
        {"text": LONG},
        {"text": 4 * f"{LONG}\n"},
    ],
    "technical": [
        {"text": TEX},
        {"text": f"Rivers\n\n{PROSE}\n\nReferences\n[1] A. Author, 1999.\n"},
        {"text": f"Rivers\n\nReferences\n\n{PROSE}\n"},
        {"text": f"\\documentclass{{a}}\n{PROSE}"},
        {"text": LONG},
    ],
}


def sources(home: Path) -> dict[str, Source]:
    """A source for every recipe, by its name, and one that asks for every pass."""
    found = {}
    for name, rows in ROWS.items():
        licence = "permissive" if name == "source_code" else "CC0-1.0"
        found[name] = Source(name, str(home / name), licence, 1.0, 1)
        write_rows(home / name / "0.jsonl", rows)
    (home / "web").mkdir()
    with (home / "web" / "0.warc.gz").open("wb") as file:
        write_archive(file, ADDRESSES.items())
    found["web"] = Source("web", str(home / "web"), "CC0-1.0", 1.0, 1)
    found["manuals"] = Source("manuals", str(home / "pages"), "CC0-1.0", 1.0, 1)
    (home / "pages").mkdir()
    for name, page in PAGES.items():
        (home / "pages" / f"{name}.html").write_text(page)
    rows = [
        {"text": f"{text} {tail}"}
        for text in (PROSE, SECOND)
        for tail in ("One.", "Two.", f"{LONG} {LONG}.")
    ]
    rows += [{"text": STORY}, {"text": STORY.split("\n\n")[-1]}]
    rows += [
        {"text": f"{3 * SHOP} {QUESTION}"},
        {"text": f"{SUMS} mail ann@corp.org {PROSE[50:]} {LONG}"},
    ]
    write_rows(home / "passes" / "0.jsonl", rows)
    found["passes"] = Source(
        "curated", str(home / "passes"), "CC0-1.0", 1.0, 1,
        near_duplicates="14x8", exact_substrings=20, replace_pii=True, decontaminate=True,
    )  # fmt: skip
    return found


def material(home: Path) -> dict[str, Build]:
    """What a first pass begins with, of every source: raw files, pinned."""
    assets = make_assets(home)
    found = {}
    for name, source in sources(home / "raw").items():
        found[name] = Build(source, assets, home / "clean" / name, keep_exclusions=False)
        found[name].place.mkdir(parents=True)
        kind, files = raw_files(source.input)
        pin_files(found[name].place, kind, list(files))
    return found


def clean_documents(build: Build) -> list[bytes]:
    """The lines that all passes of a source end in."""
    for one in clean.passes(build):
        for function, *arguments in one.jobs():
            function(*arguments)
    clean.finish(build)
    paths = sorted(build.place.glob("*.jsonl.gz"))
    return [line for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


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


def outputs(home: Path, builds: dict[str, Build]) -> dict[str, dict[str, Any]]:
    """Of every recipe, the passes, sharding and a vocabulary's training: versions, and hashes of
    all else.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, build in builds.items():
        lines = clean_documents(build)
        paths = [
            path for folder in (Path(build.source.input), home) for path in sorted(folder.iterdir())
        ]
        found[name] = {"versions": fingerprints.versions_of(build.source), "documents": len(lines)}
        found[name] |= {
            "input": digest(map(content, filter(Path.is_file, paths))),
            "sha256": digest(lines),
        }
    shards = digest(megatron_shards(home / "megatron"))
    raw = digest(map(content, sorted((home / "megatron" / "raw").iterdir())))
    found["megatron"] = {
        "versions": {"megatron": megatron.RECIPE_VERSION},
        "input": raw,
        "sha256": shards,
    }
    passes = found["passes"]
    shards = digest(
        sharded(
            home / "clean" / "passes", ["00000.jsonl.gz"], passes["documents"], home / "shards-1"
        )
    )
    raw = digest([passes["sha256"].encode(), VOCABULARY.read_bytes()])
    found["sharding"] = {"versions": {"sharding": shard.VERSION}, "input": raw, "sha256": shards}
    texts = [PROSE, SECOND, CODE, SUMS]
    tokenizer.train(texts, 300, home / "vocabulary")
    versions = {"training": tokenizer.TRAINING_VERSION, "tokenizers": version("tokenizers")}
    trained = digest([(home / "vocabulary" / tokenizer.FILE).read_bytes()])
    found["vocabulary"] = {
        "versions": versions,
        "input": digest(map(str.encode, texts)),
        "sha256": trained,
    }
    rules = rules_of(home, builds)
    return {name: {**entry, "rules": rules[name]} for name, entry in found.items()}


def content(path: Path) -> bytes:
    """A file's bytes, unpacked: what zlib makes of them differs between machines."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of parts, with their borders."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def rules_of(home: Path, builds: dict[str, Build]) -> dict[str, str]:
    """A hash of the rules of every entry: constants that its code reads, and what its steps were
    built with.
    """
    rules: dict[str, list[Any]] = {
        "megatron": constants([megatron.shard_task]),
        "sharding": constants([shard.shard_task]),
        "vocabulary": constants([shard.tokenizer_task]),
    }
    for name, build in builds.items():
        of_passes = [clean.clean_task, clean.passes] if name == "passes" else []
        steps = [arguments(step) for step in steps_of(build)]
        rules[name] = [*constants([recipes.load(build.source.recipe).steps, *of_passes]), *steps]
    return {
        name: digest([json.dumps(found).replace(str(home), "").encode()])
        for name, found in rules.items()
    }


def steps_of(build: Build) -> list[PipelineStep]:
    """The steps of a source's first pass, as its tasks build them."""
    with mock.patch.object(clean, "run_task") as run:
        clean.clean_task(build, 0)
    return list(run.call_args.args[0])


def constants(roots: Iterable[Any]) -> list[Any]:
    """Names and values of all constants and defaults that functions read, or functions and classes
    of data/ they name.

    They bear no module's name, so code may move from one to another.
    """
    found: set[str] = set()
    seen: set[Any] = set()
    left = list(roots)
    while left:
        part = inspect.unwrap(left.pop())
        if (
            not isinstance(part, FunctionType | type)
            or not of_data(part.__module__)
            or part in seen
        ):
            continue
        seen.add(part)
        for name, value in members(part):
            left.append(value)
            if name.rpartition(".")[2].isupper() and name not in NO_RULES:
                found.add(json.dumps([name, plain(value)]))
        if isinstance(part, FunctionType) and (part.__defaults__ or part.__kwdefaults__):
            defaults = [plain(part.__defaults__), plain(part.__kwdefaults__)]
            found.add(json.dumps([part.__qualname__, *defaults]))
    return sorted(found)


def members(part: Any) -> list[tuple[str, Any]]:
    """What a class holds and inherits, or what a function's code names in its module or in a module
    of data/.
    """
    if isinstance(part, type):
        held = [(f"{part.__name__}.{name}", value) for name, value in vars(part).items()]
        return [*held, *(("", base) for base in part.__bases__)]
    read, named = names_in(part.__code__)
    scope = {name: part.__globals__[name] for name in read if name in part.__globals__}
    modules = [
        value
        for value in scope.values()
        if isinstance(value, ModuleType) and of_data(value.__name__)
    ]
    return [
        *scope.items(),
        *((name, vars(module)[name]) for module in modules for name in named & vars(module).keys()),
    ]


def of_data(module: str) -> bool:
    """Whether a module is one of ours that shape text."""
    return module.startswith("data.")


def names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """The globals that a function's code reads, and every name in it, attributes too; with
    functions inside it.
    """
    read = {one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}
    named = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more_read, more_named = names_in(inner)
            read, named = read | more_read, named | more_named
    return read, named


def arguments(part: Any, deep: bool = True) -> list[Any]:
    """Kind and plain values of an object, and one level deeper those of objects that belong to a
    pipeline.
    """
    held = []
    for name, value in sorted(vars(part).items()):
        if deep and type(value).__module__.startswith(("data.", "datatrove.pipeline.")):
            held.append([name, arguments(value, deep=False)])
        else:
            held.append([name, plain(value)])
    return [type(part).__name__, *held]


def plain(value: Any) -> Any:
    """A constant as JSON can write it, the same in every process; None for what is no plain value,
    as a path.
    """
    if isinstance(value, re.Pattern):
        return ["pattern", plain(value.pattern), value.flags]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([plain(key), plain(held)] for key, held in value.items())]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(json.dumps(plain(held)) for held in value)]
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    return value if isinstance(value, str | int | float) else None


def hidden(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """Entries with other text of the same input under the same versions: a new record would take it
    for the old.
    """
    return [
        name
        for name in before.keys() & now.keys()
        if before[name]["sha256"] != now[name]["sha256"]
        and all(before[name][key] == now[name][key] for key in ("input", "versions"))
    ]


def main() -> int:
    """Write the record anew; returns the exit code, 1 where a version has to be raised before."""
    with tempfile.TemporaryDirectory() as folder:
        now = outputs(Path(folder), material(Path(folder)))
    if RECORD.is_file() and (names := hidden(json.loads(RECORD.read_text()), now)):
        print(
            f"not written, for other text came of the same input: {', '.join(sorted(names))}. "
            "Raise the version first"
        )
        return 1
    RECORD.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    print(f"written to {RECORD}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
