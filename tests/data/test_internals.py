"""Undocumented behaviour of other packages that data/ relies on, and the version it was read in."""

import ast
import inspect
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from core.errors import InputError
from core.files import ROOT
from data.config import PrepareConfig
from data.pipeline import accounting, minhash
from data.pipeline.executors import SlurmArray, SlurmExecutor
from data.pipeline.tasks import SingleTaskExecutor, set_exclusion_writers
from data.readers.archives import read_record
from data.readers.web import decompress
from data.recipes.classifiers import load_model
from data.recipes.extraction import MainTextExtractor
from data.recipes.urls import make_blocklist_filter
from tests.compose import typed

# package -> (version read, our code that relies on it -> the behaviour)
READ = {
    "datatrove": (
        "0.10.1",
        {
            SingleTaskExecutor: "_run_for_rank runs a task, writes its statistics and its "
            "completion mark",
            SlurmArray: "run() submits, launch_merge_stats and save_executor_as_json are hooks, "
            "job_id_retriever gets sbatch's answer",
            MainTextExtractor: "extract() runs in ExtractorSandbox.process_document, whose "
            "three errors name the reason why a page has no text",
            make_blocklist_filter: "a filter's lists do not change once download_data() has read "
            "them",
            set_exclusion_writers: "a step that drops documents has an exclusion_writer",
            minhash.read_pairs: ".dups holds four <u4 per pair: file, document, file, document",
            minhash.clusters: ".remove holds the indices of a file's documents as <u4, sorted",
            accounting.read_step: "stats/<task>.json: total, forwarded, dropped and dropped_* of "
            "every step",
        },
    ),
    "fasttext-numpy2-wheel": (
        "0.9.2",
        {load_model: "_FastText(path) reads a model without load_model's warning"},
    ),
    "warcio": (
        "1.8.1",
        {
            read_record: "StatusAndHeadersParser takes the first line apart from the stream, and "
            "stops at the end of a LimitReader",
            decompress: "ChunkedDataReader returns a body that is not chunked as it is",
        },
    ),
}
# file -> private names of other packages that it may use
PRIVATE = {
    "data/pipeline/tasks.py": {"self._run_for_rank"},
    "data/recipes/classifiers.py": {"_FastText"},
}


@pytest.mark.parametrize("package", READ)
def test_internals_are_reviewed_at_an_upgrade(package: str) -> None:
    version_read, uses = READ[package]
    lines = [
        f"{inspect.getsourcefile(inspect.unwrap(user))}: {behaviour}"
        for user, behaviour in uses.items()
    ]
    assert version(package) == version_read, f"compare {package} with " + "\n".join(lines)


def test_private_names_are_used_only_where_listed() -> None:
    for path in sorted(Path(ROOT, "data").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        used = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.endswith("__")
            and node.attr not in defined
        }
        used |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.name.startswith("_")
        }
        assert used == PRIVATE.get(str(path.relative_to(ROOT)), set()), path


def test_block_lists_are_shared_and_counts_are_not(tmp_path: Path) -> None:
    (tmp_path / "domains").write_text("casino-lists.com\n")
    first, second = (make_blocklist_filter(str(tmp_path / "domains")) for _ in range(2))
    assert first.block_listed_domains is second.block_listed_domains == {"casino-lists.com"}
    first.stat_update("total")
    assert "total" in first.stats.stats and "total" not in second.stats.stats


@pytest.mark.parametrize(
    ("folder", "changed", "key"),
    [
        ("a b", {}, "data.folder"),
        ("50%j", {}, "data.folder"),
        ("a", {"qos": "x y"}, "executor.qos"),
    ],
)
def test_a_text_that_datatrove_would_not_quote_is_refused(
    folder: str, changed: dict[str, str], key: str, tmp_path: Path
) -> None:
    slurm = typed(PrepareConfig, "demo", "executor=slurm", "executor.partition=cpu").executor
    with pytest.raises(InputError, match=f"^{key} is .*: with executor=slurm set one of letters"):
        SlurmExecutor(replace(slurm, **changed), 1, tmp_path / folder)
    assert SlurmExecutor(slurm, 1, tmp_path / "plain").describe().startswith("Slurm partition cpu")
