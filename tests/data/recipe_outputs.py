"""Record of recipe outputs: hashes of the outputs for a fixed input, of the rules, and versions.

python -m tests.data.recipe_outputs    # rewrite recipe_outputs.json, after raising a version

A fixed input tests a rule only near its threshold, so the rules are hashed too (hash_rules). Change
the input in a separate commit: with another input, another output says nothing about a recipe.
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
from data.pipeline.shard import CleanDocuments, ShardingSpec
from data.readers.listing import list_raw_files, pin_files
from examples.demo_corpus.archives import write_archive
from tests.data.samples import GERMAN, PROSE, QUESTION, SHOP, SUMS, make_assets, write_rows

IGNORED_CONSTANTS = {"RECIPE_VERSION", "VERSION", "TRAINING_VERSION", "REQUIRES", "ASSETS"}
FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER / "recipe_outputs.json"
TOKENIZER = FOLDER.parent / "fixtures" / "prepared" / "tokenizer" / "tokenizer.json"
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
    "documents": [{"text": PROSE}, {"text": STORY}, {"text": "1 2 3 " * 90}, {"text": "Short"}],
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


def make_sources(folder: Path) -> dict[str, Source]:
    """Make a source for every recipe, and "passes", a source with every pass."""
    sources = {}
    for name, rows in ROWS.items():
        licence = "permissive" if name == "source_code" else "CC0-1.0"
        sources[name] = Source(name, str(folder / name), licence, 1.0, 1)
        write_rows(folder / name / "0.jsonl", rows)
    (folder / "web").mkdir()
    with (folder / "web" / "0.warc.gz").open("wb") as file:
        write_archive(file, ADDRESSES.items())
    sources["web"] = Source("web", str(folder / "web"), "CC0-1.0", 1.0, 1)
    sources["manuals"] = Source("manuals", str(folder / "pages"), "CC0-1.0", 1.0, 1)
    (folder / "pages").mkdir()
    for name, page in PAGES.items():
        (folder / "pages" / f"{name}.html").write_text(page)
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
    write_rows(folder / "passes" / "0.jsonl", rows)
    sources["passes"] = Source(
        "curated", str(folder / "passes"), "CC0-1.0", 1.0, 1,
        near_duplicates="14x8", exact_substrings=20, replace_pii=True, decontaminate=True,
    )  # fmt: skip
    return sources


def make_builds(root: Path) -> dict[str, Build]:
    """Write the raw files of every source and pin them for its first pass."""
    assets = make_assets(root)
    builds = {}
    for name, source in make_sources(root / "raw").items():
        builds[name] = Build(source, assets, root / "clean" / name, keep_exclusions=False)
        builds[name].folder.mkdir(parents=True)
        pin_files(builds[name].folder, list_raw_files(source.input))
    return builds


def run_passes(build: Build) -> list[bytes]:
    """Run all passes of a source; returns the lines of its clean documents."""
    for one in clean.passes(build):
        for function, *arguments in one.jobs():
            function(*arguments)
    clean.finish(build)
    paths = sorted(build.folder.glob("*.jsonl.gz"))
    return [line for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


def make_megatron_shards(root: Path) -> list[bytes]:
    """Write sixty documents with megatron-core and convert them; returns the shards."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    (root / "raw").mkdir(parents=True)
    builder = IndexedDatasetBuilder(str(root / "raw" / "a.bin"))
    for index in range(60):
        builder.add_item(torch.arange(12, 20 + index))
        builder.end_document()
    builder.finalize(str(root / "raw" / "a.idx"))
    (root / "shards").mkdir()
    job = megatron.MegatronCorpus(str(root / "raw"), ["a.idx"], root / "shards", 11, 300, 1)
    megatron.shard_task(job, 50.0, 0)
    return [path.read_bytes() for path in sorted((root / "shards").glob("*.ds*"))]


def make_shards(clean_dir: Path, files: list[str], documents: int, out: Path) -> list[bytes]:
    """Shard a source's clean documents with the fixture's tokenizer; returns the shards."""
    out.mkdir()
    job = ShardingSpec(CleanDocuments(clean_dir, files, documents), out, TOKENIZER, 3, 50.0, 1)
    shard.shard_task(job, 0)
    return [path.read_bytes() for path in sorted(out.glob("*.ds*"))]


def compute_outputs(root: Path, builds: dict[str, Build]) -> dict[str, dict[str, Any]]:
    """Run every recipe, the passes, sharding and tokenizer training; returns the record."""
    record: dict[str, dict[str, Any]] = {}
    for name, build in builds.items():
        lines = run_passes(build)
        paths = [
            path for folder in (Path(build.source.input), root) for path in sorted(folder.iterdir())
        ]
        record[name] = {
            "versions": fingerprints.versions_of(build.source),
            "documents": len(lines),
            "input": digest(map(read_content, filter(Path.is_file, paths))),
            "sha256": digest(lines),
        }
    shards = make_megatron_shards(root / "megatron")
    record["megatron"] = {
        "versions": {"megatron": megatron.RECIPE_VERSION},
        "input": digest(map(read_content, sorted((root / "megatron" / "raw").iterdir()))),
        "sha256": digest(shards),
    }
    passes = record["passes"]
    clean_dir = root / "clean" / "passes"
    shards = make_shards(clean_dir, ["00000.jsonl.gz"], passes["documents"], root / "shards-1")
    record["sharding"] = {
        "versions": {"sharding": shard.VERSION},
        "input": digest([passes["sha256"].encode(), TOKENIZER.read_bytes()]),
        "sha256": digest(shards),
    }
    texts = [PROSE, SECOND, CODE, SUMS]
    tokenizer.train(texts, 300, root / "vocabulary")
    record["vocabulary"] = {
        "versions": {"training": tokenizer.TRAINING_VERSION, "tokenizers": version("tokenizers")},
        "input": digest(map(str.encode, texts)),
        "sha256": digest([(root / "vocabulary" / tokenizer.FILE).read_bytes()]),
    }
    rules = hash_rules(root, builds)
    return {name: {**entry, "rules": rules[name]} for name, entry in record.items()}


def read_content(path: Path) -> bytes:
    """A file's bytes, decompressed, since zlib's output differs between machines."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def digest(items: Iterable[bytes]) -> str:
    """SHA-256 of items, each with its length."""
    sha256 = hashlib.sha256()
    for item in items:
        sha256.update(len(item).to_bytes(8, "little") + item)
    return sha256.hexdigest()


def hash_rules(root: Path, builds: dict[str, Build]) -> dict[str, str]:
    """Hash the rules of every entry: constants that its code reads, and settings of its steps."""
    rules: dict[str, list[Any]] = {
        "megatron": collect_constants([megatron.shard_task]),
        "sharding": collect_constants([shard.shard_task]),
        "vocabulary": collect_constants([shard.tokenizer_task]),
    }
    for name, build in builds.items():
        functions = [recipes.load(build.source.recipe).steps]
        if name == "passes":
            functions += [clean.clean_task, clean.passes]
        settings = [settings_of(step) for step in first_pass_steps(build)]
        rules[name] = [*collect_constants(functions), *settings]
    return {
        name: digest([json.dumps(values).replace(str(root), "").encode()])
        for name, values in rules.items()
    }


def first_pass_steps(build: Build) -> list[PipelineStep]:
    """The steps of a source's first pass, as its tasks build them."""
    with mock.patch.object(clean, "run_task") as run:
        clean.clean_task(build, 0)
    return list(run.call_args.args[0])


def collect_constants(roots: Iterable[Any]) -> list[Any]:
    """Names and values of constants and defaults that functions of data/ read, directly or not.

    Module names are left out, so that code may move between modules.
    """
    constants: set[str] = set()
    visited: set[Any] = set()
    pending = list(roots)
    while pending:
        item = inspect.unwrap(pending.pop())
        if (
            not isinstance(item, FunctionType | type)
            or not is_data_module(item.__module__)
            or item in visited
        ):
            continue
        visited.add(item)
        for name, value in references(item):
            pending.append(value)
            if name.rpartition(".")[2].isupper() and name not in IGNORED_CONSTANTS:
                constants.add(json.dumps([name, to_json(value)]))
        if isinstance(item, FunctionType) and (item.__defaults__ or item.__kwdefaults__):
            defaults = [to_json(item.__defaults__), to_json(item.__kwdefaults__)]
            constants.add(json.dumps([item.__qualname__, *defaults]))
    return sorted(constants)


def references(item: Any) -> list[tuple[str, Any]]:
    """(name, value) of a class's attributes and bases, or of the names that a function's code uses.

    A function's names are looked up in its module and in the modules of data/ that it uses.
    """
    if isinstance(item, type):
        attributes = [(f"{item.__name__}.{name}", value) for name, value in vars(item).items()]
        return [*attributes, *(("", base) for base in item.__bases__)]
    globals_read, names = names_in(item.__code__)
    scope = {name: item.__globals__[name] for name in globals_read if name in item.__globals__}
    modules = [
        value
        for value in scope.values()
        if isinstance(value, ModuleType) and is_data_module(value.__name__)
    ]
    return [
        *scope.items(),
        *((name, vars(module)[name]) for module in modules for name in names & vars(module).keys()),
    ]


def is_data_module(module: str) -> bool:
    return module.startswith("data.")


def names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """The globals that code reads, and all its names with attributes; includes nested functions."""
    globals_read = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_GLOBAL"
    }
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            nested_globals, nested_names = names_in(constant)
            globals_read |= nested_globals
            names |= nested_names
    return globals_read, names


def settings_of(item: Any, deep: bool = True) -> list[Any]:
    """Type name and plain attributes of a step, and of the pipeline objects it has as attributes."""
    attributes = []
    for name, value in sorted(vars(item).items()):
        if deep and type(value).__module__.startswith(("data.", "datatrove.pipeline.")):
            attributes.append([name, settings_of(value, deep=False)])
        else:
            attributes.append([name, to_json(value)])
    return [type(item).__name__, *attributes]


def to_json(value: Any) -> Any:
    """A constant as JSON, the same in every process; None for other objects, such as paths."""
    if isinstance(value, re.Pattern):
        return ["pattern", to_json(value.pattern), value.flags]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([to_json(key), to_json(item)] for key, item in value.items())]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(json.dumps(to_json(item)) for item in value)]
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value if isinstance(value, str | int | float) else None


def find_unversioned(
    before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]
) -> list[str]:
    """Entries whose output changed although their input and versions did not."""
    return [
        name
        for name in before.keys() & now.keys()
        if before[name]["sha256"] != now[name]["sha256"]
        and all(before[name][key] == now[name][key] for key in ("input", "versions"))
    ]


def main() -> int:
    """Rewrite the record; returns the exit code, 1 if a version must be raised first."""
    with tempfile.TemporaryDirectory() as folder:
        now = compute_outputs(Path(folder), make_builds(Path(folder)))
    if RECORD.is_file() and (names := find_unversioned(json.loads(RECORD.read_text()), now)):
        print(
            f"not written: the same input gives another output in {', '.join(sorted(names))}. "
            "Raise the version first"
        )
        return 1
    RECORD.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    print(f"written to {RECORD}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
