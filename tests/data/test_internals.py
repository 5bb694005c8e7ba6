"""What data/ takes of other packages beyond their documented interfaces, and the version in which
somebody has read it.
"""

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

from core.files import ROOT
from data.pipeline import accounting, minhash
from data.pipeline.executors import SlurmArray
from data.pipeline.tasks import OneTask, exclude_into
from data.recipes.classifiers import load_model
from data.recipes.extraction import MainTextExtractor
from data.recipes.readers import Warc
from data.recipes.urls import make_blocklist_filter

# by package: version read, and what we rely on at the one place that does
READ = {
    "datatrove": (
        "0.10.1",
        {
            OneTask: "_run_for_rank runs a task, writes its statistics and its completion mark",
            SlurmArray: "run() submits, launch_merge_stats and save_executor_as_json are hooks, "
            "job_id_retriever gets sbatch's answer",
            MainTextExtractor: "extract() runs in ExtractorSandbox.process_document, whose "
            "three errors tell why a page has no text",
            Warc.read_file: "process_record gives a record's text and url, or None for no HTML",
            make_blocklist_filter: "a filter's lists do not change once download_data() has read "
            "them",
            exclude_into: "a step that drops documents has an exclusion_writer",
            minhash.pairs_of: ".dups holds four <u4 a pair: file, document, file, document",
            minhash.clusters: ".remove holds the numbers of a file's documents as <u4, sorted",
            accounting.read_step: "stats/<task>.json: total, forwarded, dropped and dropped_* of "
            "every step",
        },
    ),
    "fasttext-numpy2-wheel": (
        "0.9.2",
        {load_model: "_FastText(path) reads a model without load_model's warning"},
    ),
    "warcio": ("1.8.1", {Warc.read_file: "EOFError of the stream ends an archive in silence"}),
}
# a name of theirs with an underscore is used where the table says so, and nowhere else
PRIVATE = {
    "data/pipeline/tasks.py": {"self._run_for_rank"},
    "data/recipes/classifiers.py": {"_FastText"},
}


@pytest.mark.parametrize("package", READ)
def test_internals_are_read_again_at_an_upgrade(package: str) -> None:
    read, places = READ[package]
    found = [
        f"{inspect.getsourcefile(inspect.unwrap(place))}: {what}" for place, what in places.items()
    ]
    assert version(package) == read, f"compare {package} with " + "\n".join(found)


def test_private_names_stay_in_their_places() -> None:
    for path in sorted(Path(ROOT, "data").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        used = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.endswith("__")
            and node.attr not in own
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
    one, other = (make_blocklist_filter(str(tmp_path / "domains")) for _ in range(2))
    assert one.block_listed_domains is other.block_listed_domains == {"casino-lists.com"}
    one.stat_update("total")
    assert "total" in one.stats.stats and "total" not in other.stats.stats
