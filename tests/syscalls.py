"""What a command wrote and synced, in order, from strace; and a tiny run as such a command.

python tests/syscalls.py FOLDER prepares a data set in FOLDER, trains on it, and exports the run.
"""

import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

WRITES = ("write", "pwrite64", "writev", "ftruncate", "copy_file_range", "sendfile")
SYNCS = ("fsync", "fdatasync", "syncfs")
RENAMES = ("rename", "renameat", "renameat2", "link", "linkat")
CALLS = (*WRITES, *SYNCS, *RENAMES, "mkdir", "mkdirat")
# -y adds the path of each descriptor; the filter keeps other calls at full speed
STRACE = ["strace", "-f", "-y", "-qq", "-s0", "--seccomp-bpf", "-e", f"trace={','.join(CALLS)}"]
LINE = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\((.*)| resumed>(.*))$")
DESCRIPTOR = re.compile(r"\d+<(/[^<>]*)>")
NAME = re.compile(r'"([^"]*)"')
# a folder in which renames are tried, and the lock of a process, which ends with the power
UNSYNCED = re.compile(r"/\.probe-|/run\.lock$")


@dataclass(frozen=True)
class Call:
    """A system call that succeeded: its name, and the paths in its arguments."""

    name: str
    paths: tuple[str, ...]


def read_calls(lines: Iterable[str]) -> Iterator[Call]:
    """Calls of a trace in the order of their ends."""
    begun: dict[str, str] = {}  # by process
    for line in lines:
        if (match := LINE.match(line.rstrip())) is None or match[2] not in CALLS:
            continue
        process, name, arguments, rest = match.groups()
        if arguments is not None and arguments.endswith("<unfinished ...>"):
            begun[process] = arguments
            continue
        text = arguments if arguments is not None else begun.pop(process, "") + rest
        if re.search(r"\) += -1 ", text):
            continue
        descriptors = name in (*WRITES, *SYNCS)
        paths = (DESCRIPTOR if descriptors else NAME).findall(text)
        # copies name the descriptor that is written second, but sendfile
        last = name == "copy_file_range"
        yield Call(name, tuple((paths[-1:] if last else paths[:1]) if descriptors else paths))


class Disk:
    """Which files and folder entries below `root` a power cut may take, call by call."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.unsynced: set[str] = set()  # files with writes, and folders with new names
        self.new_names: dict[str, str] = {}  # renamed or made -> its folder, not synced since
        self.renamed: list[str] = []
        self.faults: list[str] = []

    def apply(self, call: Call) -> None:
        """Follow one call; a rename of what is not on disk is a fault."""
        paths = [path for path in call.paths if f"{path}/".startswith(f"{self.root}/")]
        if call.name == "syncfs":
            self.unsynced.clear()
            self.new_names.clear()
        elif not paths or UNSYNCED.search(paths[-1]):
            return
        elif call.name in WRITES:
            self.unsynced.add(paths[0])
        elif call.name in SYNCS:
            self.unsynced.discard(paths[0])
            self.new_names = {
                name: folder for name, folder in self.new_names.items() if folder != paths[0]
            }
        elif call.name in RENAMES and len(paths) == 2:
            self._rename(*paths)
        else:
            self._add(paths[0])

    def _rename(self, source: str, target: str) -> None:
        """A name in a folder that is not finished (`.part`) may come before the sync."""
        self.renamed.append(target.removeprefix(f"{self.root}/"))
        if source in self.unsynced and "/" in target.partition(".part")[2]:
            self.unsynced ^= {source, target}
        inside = [
            path
            for path in (*self.unsynced, *self.new_names)
            if path.startswith(f"{source}/") or (path == source and path in self.unsynced)
        ]
        self.faults += [f"{path} is not synced before {source} -> {target}" for path in inside]
        for path in inside:
            self.unsynced.discard(path)
            self.new_names.pop(path, None)
        self._add(target)

    def _add(self, path: str) -> None:
        self.new_names[path] = os.path.dirname(path)

    def finish(self) -> list[str]:
        """All faults: also names that are in their folder only until a power cut."""
        return self.faults + [
            f"{name} is not synced into {folder}"
            for name, folder in self.new_names.items()
            if os.path.exists(name)
        ]


def prepare_train_export(root: Path) -> None:
    """A preparation with all passes, a short run and its export, in this process."""
    from data.config import DataConfig, Source, Stage, TokenizerConfig
    from data.prepare import prepare
    from eval.export import export
    from tests import small
    from tests.tiny import TINY
    from train.run_context import start

    (root / "raw").mkdir()
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghij", k=5)) for _ in range(500)]
    for file in range(2):
        texts = (" ".join(letters.choices(words, k=60)) for _ in range(40))
        rows = [json.dumps({"text": text}) for text in texts]
        (root / "raw" / f"{file}.jsonl").write_text("\n".join(rows) + "\n")
    source = Source(
        *("curated", str(root / "raw"), "CC0-1.0", 40.0, 2),
        exact_substrings=50,
        near_duplicates="14x8",
    )
    data = DataConfig(
        folder=str(root / "data" / "set"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=2,
        tokenizer=TokenizerConfig(None, None, 288, 1),
        sources={"text": source},
        stages=[Stage("only", 640, 16, {"text": 1.0})],
    )
    prepare(data)
    run = small.config(root / "runs" / "tiny", "run")
    run = replace(run, data=data, model=replace(TINY, vocab_size=288))
    run.schedule.warmup_tokens = run.schedule.decay_tokens = 64
    run.schedule.ramp_tokens = 0
    start(run, "cpu")
    export(small.evaluation(run))


if __name__ == "__main__":
    prepare_train_export(Path(sys.argv[1]))
