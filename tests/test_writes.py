"""All that is written is on disk before it gets its name: rules for the code, and a trace."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import TIMEOUT_SECONDS
from tests.syscalls import STRACE, Call, Disk, read_calls
from tests.test_architecture import ROOT, SOURCES

# who may rename or link besides core/files.py, and why
RENAMES = {
    "eval/leaderboard/jobs.py": "hard links to a checkpoint, synced by sync_folder",
    "train/checkpoint/manager.py": "a damaged checkpoint",
    "train/checkpoint/writer.py": "the checkpoint, with its own order of syncs",
    "train/resilience/run_lock.py": "the lock, for which the link decides who has it",
}
# who may open files for writing, and why
WRITES = {
    "core/log.py": "a closed standard stream, to /dev/null",
    "data/pipeline/megatron.py": "shards in a build folder, synced when a task ends",
    "data/pipeline/minhash.py": "a `.part` folder, synced by publish_folder",
    "data/pipeline/shard.py": "shards in a build folder, synced when a task ends",
    "data/pipeline/substrings.py": "a build folder, synced when a task ends",
    "data/pipeline/workers.py": "a lock, and logs",
    "data/readers/base.py": "quarantine in a build folder, synced when a task ends",
    "eval/leaderboard/jobs.py": "the log of a job",
    "launch/planning/run_checks.py": "a file that measures the disk",
    "launch/slurm/attempts.py": "appends lines",
    "model/hf_writer.py": "weights in a `.part` folder, synced by publish_folder",
    "train/checkpoint/writer.py": "the checkpoint, with its own order of syncs",
    "train/resilience/incidents.py": "the outcome, in space reserved for a full disk",
    "train/metrics/records.py": "appends lines",
    "train/resilience/last_words.py": "stacks of a rank that hangs, which must not wait for a sync",
    "train/resilience/run_lock.py": "the lock",
    "train/resilience/watchdog.py": "heartbeats, of use to this start only",
}
RENAMING = {"rename", "renames", "link", "symlink", "hardlink_to", "symlink_to", "move", "copytree"}
WRITING = {"write_text", "write_bytes", "tofile", "touch", "save", "copy", "copy2", "copyfile"}


def calls(tree: ast.AST) -> list[tuple[str, str, ast.Call]]:
    """Called methods and functions of modules: what they belong to, their name, the call."""
    return [
        (ast.unparse(node.func.value), node.func.attr, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


def opens_for_writing(tree: ast.AST) -> bool:
    """Whether `open` is called with a mode or flags that write."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "open":
            words = [*node.args, *(keyword.value for keyword in node.keywords)]
            modes = [w.value for w in words if isinstance(w, ast.Constant)]
            if any(isinstance(m, str) and len(m) < 4 and set(m) & set("wax+") for m in modes):
                return True
            if any("O_WRONLY" in ast.unparse(w) or "O_RDWR" in ast.unparse(w) for w in words):
                return True
    return False


def renames(tree: ast.AST) -> bool:
    """Whether a file or folder gets another name; `replace` of a path has one argument."""
    return any(
        name in RENAMING or (name == "replace" and (owner == "os" or len(call.args) == 1))
        for owner, name, call in calls(tree)
    )


def writes(tree: ast.AST) -> bool:
    """Whether a file is written, other than with the functions of core/files.py."""
    named = any(
        name in WRITING and (owner == "shutil" if name.startswith("copy") else name != "save")
        for owner, name, _ in calls(tree)
    )
    return named or opens_for_writing(tree)


def test_only_the_writer_of_core_renames_and_writes() -> None:
    trees = {str(path): ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES}
    del trees["core/files.py"]
    assert {path for path, tree in trees.items() if renames(tree)} <= RENAMES.keys()
    assert {path for path, tree in trees.items() if writes(tree)} <= WRITES.keys()


@pytest.mark.parametrize(
    "code",
    ["a.rename(b)", "os.replace(a, b)", "a.replace(b)", "shutil.move(a, b)", "os.link(a, b)"],
)
def test_renames_are_found(code: str) -> None:
    assert renames(ast.parse(code)) and not renames(ast.parse("text.replace('a', 'b')"))


@pytest.mark.parametrize(
    "code",
    [
        "open(a, 'w')",
        "path.open('ab', buffering=0)",
        "path.open(mode='x')",
        "os.open(a, os.O_WRONLY | os.O_CREAT)",
        "path.write_text(a)",
        "array.tofile(path)",
        "shutil.copyfile(a, b)",
    ],
)
def test_writes_are_found(code: str) -> None:
    assert writes(ast.parse(code)) and not writes(ast.parse("open(a); write_text(path, a)"))


def faults(trace: str, root: Path) -> list[str]:
    disk = Disk(root)
    for call in read_calls(trace.replace("ROOT", str(root)).splitlines()):
        disk.apply(call)
    return disk.finish()


SOUND = """\
7 mkdir("ROOT/x.part", 0777) = 0
7 write(3<ROOT/x.part/a>, ""..., 5) = 5
7 fsync(3<ROOT/x.part/a> <unfinished ...>
8 write(1</dev/pts/0>, ""..., 9) = 9
7 <... fsync resumed>) = 0
7 fsync(4<ROOT/x.part>) = 0
7 rename("ROOT/x.part", "ROOT/x") = 0
7 fsync(4<ROOT>) = 0
"""


def test_a_trace_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert list(read_calls(SOUND.splitlines()))[2] == Call("write", ("/dev/pts/0",))
    assert faults(SOUND, tmp_path) == []
    unsynced = SOUND.replace("7 <... fsync resumed>) = 0", "7 <... fsync resumed>) = -1 EIO (x)")
    assert faults(unsynced, tmp_path)[0].startswith(f"{tmp_path}/x.part/a is not synced before")
    late = SOUND.replace("7 rename", '9 write(3<ROOT/x.part/a>, ""..., 5) = 5\n7 rename')
    assert len(faults(late, tmp_path)) == 1
    lines = SOUND.splitlines(keepends=True)
    assert faults("".join(lines[:-1]), tmp_path) == [f"{tmp_path}/x is not synced into {tmp_path}"]


def test_prepare_save_and_export_sync_before_they_rename(tmp_path: Path) -> None:
    """Every rename of a preparation, a run with its checkpoints, and an export, by strace."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install strace")
    trace = tmp_path / "trace"
    if subprocess.run([*STRACE, "-o", trace, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace processes here")
    root = tmp_path / "root"
    root.mkdir()
    command = [*STRACE, "-o", trace, sys.executable, ROOT / "tests" / "syscalls.py", root]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert result.returncode == 0, result.stderr
    disk = Disk(root)
    with trace.open(encoding="utf-8", errors="replace") as lines:
        for call in read_calls(lines):
            disk.apply(call)
    assert disk.finish() == []
    expected = ("clean/text", "shards/text", "tokenizer", "report.json")
    names = {f"data/set/{name}" for name in expected}
    run = ("config.yaml", "checkpoints/step-00000005", "outcome.json", "curves.png", "hf")
    names |= {f"runs/tiny/run/{name}" for name in run}
    assert names <= set(disk.renamed), names - set(disk.renamed)
