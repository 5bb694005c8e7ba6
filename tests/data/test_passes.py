"""The passes for near duplicates and exact substrings, their exclusions, and executors."""

import gzip
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from data import tokenizer
from data.config import DataConfig, Executor, ExecutorConfig, Source, Stage, TokenizerConfig
from data.pipeline import minhash, substrings
from data.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
SYLLABLES = "ba ce di fo gu ha ji ko lu me ni po qua ri su te vo wi xo ya ze".split()


def prose(seed: str, words: int) -> str:
    """Random words, distinct per seed."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(words))


ARTICLES = [prose(f"article {i}", 120) for i in range(12)]
NOTICE = prose("notice", 60)
ROWS = [
    *({"text": text, "id": f"a{i}"} for i, text in enumerate(ARTICLES)),
    # near duplicates of the first three
    *({"text": f"{ARTICLES[i]} indeed", "id": f"near{i}"} for i in range(3)),
    *(
        {"text": f"{prose(f'n{i}', 50)}. {NOTICE} {prose(f'm{i}', 50)}.", "id": f"n{i}"}
        for i in range(4)
    ),
    {"text": NOTICE, "id": "bare"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("passes")
    (root / "raw").mkdir()
    for index in range(3):
        rows = [json.dumps(row) + "\n" for row in ROWS[index::3]]
        (root / "raw" / f"{index}.jsonl").write_text(
            "".join(rows) + ("{broken\n" if index == 1 else "")
        )
    tokenizer.train((row["text"] for row in ROWS), 300, root / "vocabulary")
    source = Source(
        "curated", str(root / "raw"), "CC0-1.0", 1.0, 3, near_duplicates="14x8", exact_substrings=40
    )
    return DataConfig(
        folder=str(root / "data"),
        seed=3,
        block_tokens=64,
        heldout_percent=40.0,
        reset_state=True,
        workers=2,
        tokenizer=TokenizerConfig(str(root / "vocabulary" / tokenizer.FILE), None, 300, 1),
        sources={"web": source},
        stages=[Stage("only", 128, 64, {"web": 1.0})],
        keep_exclusions=True,
    )


@pytest.fixture(scope="module")
def built(base: DataConfig) -> DataConfig:
    prepare(base)
    return base


def shards(cfg: DataConfig) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in (Path(cfg.folder) / "shards" / "web").glob("*.*")
    }


def rows_in(folder: Path) -> list[dict[str, str]]:
    return [
        json.loads(line) for path in sorted(folder.glob("*.gz")) for line in gzip.open(path, "rt")
    ]


def test_repeats_are_removed_once(built: DataConfig) -> None:
    kept = {row["id"]: row["text"] for row in rows_in(Path(built.folder) / "clean" / "web")}
    removed = [
        row["text"].removesuffix(" indeed")
        for row in rows_in(Path(built.folder) / "clean/web/excluded/unique/01-near-duplicates")
    ]
    assert sorted(removed) == sorted(ARTICLES[:3]), "one of each pair is removed"
    assert set(ARTICLES) <= {text.removesuffix(" indeed") for text in kept.values()}, (
        "and the other is unchanged"
    )
    notices = [text for text in kept.values() if NOTICE in text]
    assert len(notices) == 1
    assert len([id for id in kept if id.startswith("n") and not id.startswith("near")]) == 4, (
        "cut, not dropped"
    )
    assert all(len(kept[f"n{i}"].split()) in (100, 160) for i in range(4)), (
        "all words outside the run are kept"
    )


def test_every_exclusion_has_a_reason(built: DataConfig) -> None:
    folder = Path(built.folder)
    assert [
        row["reason"] for row in rows_in(folder / "clean/web/excluded/cut/01-exact-substrings")
    ] in (["repeated"], [])
    (row,) = [
        json.loads(line) for p in (folder / "clean/web/quarantine").iterdir() for line in p.open()
    ]
    assert row["reason"] == "corrupt" and row["where"] == "1.jsonl:7" and row["raw"]["bytes"] == 8
    steps = json.loads((folder / "report.json").read_text())["steps"]["web"]
    assert steps[0]["total"] == len(ROWS) + 1 and steps[0]["dropped"] == {"corrupt": 1}
    assert steps[-2]["cut"] == {"documents": 4, "characters": steps[-2]["cut"]["characters"]}
    assert steps[-2]["cut"]["characters"] > 3 * len(NOTICE)
    assert (
        sum(sum(step["dropped"].values()) for step in steps) + steps[-1]["forwarded"]
        == len(ROWS) + 1
    )


@pytest.mark.parametrize(
    "mark", ["minhash/pairs/*", "substrings/repeats/*.borders", "documents/cut/*"]
)
def test_a_run_killed_in_any_pass_resumes_to_the_same_bytes(
    base: DataConfig, built: DataConfig, tmp_path: Path, mark: str
) -> None:
    cfg = replace(base, folder=str(tmp_path), workers=1)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom data.config import *\nfrom "
        "data.prepare import prepare\nprepare(DataConfig(**eval(sys.argv[2])))\n"
    )
    fields = {field: getattr(cfg, field) for field in cfg.__dataclass_fields__}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT), repr(fields)], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not list((tmp_path / "building").glob(f"clean/*/*/{mark}")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare(cfg)
    assert shards(cfg) == shards(built)


SLURM = {
    "sbatch": """import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
first, last = map(int, re.search(r"#SBATCH --array=(\\d+)-(\\d+)", script).groups())
offset = next(a.split("RUN_OFFSET=")[1] for a in sys.argv if "RUN_OFFSET" in a)
for index in range(first, last + 1):
    subprocess.run(["bash", sys.argv[-1]], stdout=sys.stderr, check=True, env={
        **os.environ, "SLURM_ARRAY_TASK_ID": str(index), "RUN_OFFSET": offset, "SLURM_JOB_ID": "7",
        "SLURM_NODELIST": "n1"})
print("Submitted batch job 7")
""",
    "srun": "import os, sys\nargs = sys.argv[sys.argv.index('-n') + 2:]\n"
    "os.execvp(args[0], args)\n",
    "scontrol": "print('n1')\n",
    "squeue": "",
    "scancel": "",
}


def test_slurm_executor_gives_the_same_bytes(
    base: DataConfig, built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs datatrove's script with fake Slurm commands that run array elements in sequence."""
    for name, text in SLURM.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    executor = ExecutorConfig(Executor.slurm, 4, "cpu", "1:00:00", 2, 8, 1001, 0.01, None)
    source = replace(base.sources["web"], near_duplicates=None)
    cfg = replace(base, folder=str(tmp_path / "data"), sources={"web": source})
    prepare(cfg, replace(executor, account="lab", qos="low"))
    (script, *_) = (tmp_path / "data" / "slurm").glob("clean/*/launch_script.slurm")
    for line in (
        "--account=lab",
        "--qos=low",
        "--partition=cpu",
        "--array=0-0%4",
        "--requeue",
        "--mem-per-cpu=2G",
    ):
        assert f"#SBATCH {line}\n" in script.read_text(), line
    local = replace(cfg, folder=str(tmp_path / "local"))
    prepare(local)
    assert shards(cfg) == shards(local)
    with pytest.raises(InputError, match="needs executor.partition"):
        prepare(cfg, replace(executor, partition=None))


def test_missing_ray_fails_at_once(
    base: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match="ray"):
        prepare(
            replace(base, folder=str(tmp_path)),
            ExecutorConfig(Executor.ray, 1, None, "1", 1, 1, 1, 1.0, None),
        )


def cut_reference(texts: list[list[str]], n: int) -> list[list[str]]:
    """Reference: remove every word that a repeated window covers."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for words in texts:
        removed: set[int] = set()
        for start in range(len(words) - n + 1):
            window = tuple(words[start : start + n])
            if window in seen:
                removed |= set(range(start, start + n))
            seen.add(window)
        kept.append([word for index, word in enumerate(words) if index not in removed])
    return kept


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=30), min_size=1, max_size=8),
    st.integers(2, 9),
    st.integers(1, 3),
)
def test_exact_substrings_match_the_reference(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], n: int, bits: int
) -> None:
    """Over several tasks, runs and partitions, with positions beyond 32 bits."""
    work = tmp_path_factory.mktemp("cut")
    tasks = [texts[:3], texts[3:]]
    base = 2**33
    for rank, task in enumerate(tasks):
        windows = substrings.Windows(n, work / "windows", 2**bits, first_position=base)
        substrings.CHUNK, before = 16, substrings.CHUNK
        windows.run((Text(" ".join(words)) for words in task), rank)  # type: ignore[arg-type]
        substrings.CHUNK = before
    for partition in range(2**bits):
        substrings.find_repeats(work, partition, 2)
    result = []
    for rank, task in enumerate(tasks):
        paths = [work / "repeats" / f"{p:06d}.places" for p in range(2**bits)]
        partitions = [
            substrings.read_partition(path, path.with_suffix(".borders"), rank, np.dtype("<u8"))
            for path in paths
        ]
        repeats = np.sort(np.concatenate(partitions)).astype(np.int64) - base
        start = 0
        for words in task:
            positions = repeats[(repeats >= start) & (repeats < start + len(words))] - start
            result.append(substrings.cut_windows(" ".join(words), positions, n).split())
            start += len(words)
    assert result == cut_reference(texts, n)
    shutil.rmtree(work)


class Text:
    """A document as Windows reads it."""

    def __init__(self, text: str) -> None:
        self.text = text


def test_a_cut_joins_no_words() -> None:
    text = "one, two. Three four five. six"
    assert substrings.cut_windows(text, np.array([3]), 4) == "one, two. six"
    assert substrings.cut_windows(text, np.array([2]), 2) == "one, Three four five. six"
    assert substrings.cut_windows(text, np.array([1]), 3) == "one Three four five. six"


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(*[st.integers(0, 3), st.integers(0, 12)] * 2), max_size=12), max_size=4
    )
)
def test_clusters_are_the_connected_components(
    tmp_path_factory: pytest.TempPathFactory, buckets: list[list[tuple[int, int, int, int]]]
) -> None:
    """Against networkx; the first document of each cluster is kept."""
    work = tmp_path_factory.mktemp("clusters")
    (work / "pairs").mkdir()
    for number, pairs in enumerate(buckets):
        np.array(pairs, dtype="<u4").tofile(work / "pairs" / f"{number:05d}_00.dups")
    minhash.clusters(work)
    removed = {
        (int(path.stem), int(index))
        for path in (work / "remove").iterdir()
        for index in np.fromfile(path, dtype="<u4")
    }
    graph = networkx.Graph(((a, b), (c, d)) for pairs in buckets for a, b, c, d in pairs)
    expected = {
        node for component in networkx.connected_components(graph) for node in sorted(component)[1:]
    }
    assert removed == expected


def test_partitions_are_bounded() -> None:
    assert substrings.partitions_for(1000) == 1
    for tokens in (10**9, 10**12):
        number = substrings.partitions_for(tokens)
        assert tokens * 16 / number <= substrings.PARTITION_BYTES and number & (number - 1) == 0
