"""One task of a pipeline: what runs in a worker process, what it reads and where it writes.

A task is the unit of resuming: it either ended, and datatrove's completion mark says so, or is run
again from its start and overwrites what it left.
"""

import hashlib
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.stats import PipelineStats

from data.recipes.readers import Jsonl


class OneTask(LocalPipelineExecutor):
    """A single task in this process; workers.py's pool replaces datatrove's and its manager."""

    def run(self) -> PipelineStats:
        """Statistics of the task, empty when it was completed before."""
        # other than 0: errors only on the terminal
        return self._run_for_rank(self.local_rank_offset, local_rank=1)


def run_task(pipeline: list[PipelineStep], logs: Path, rank: int, tasks: int) -> None:
    """Run task `rank` of `tasks` of a pipeline, unless `logs` says that it is complete."""
    OneTask(
        pipeline, tasks=tasks, local_tasks=1, local_rank_offset=rank, logging_dir=str(logs)
    ).run()


class Documents(Jsonl):
    """The clean documents that one task wrote, read back by the task of the same number."""

    name = "Documents"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.files = []

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        """Documents of `folder`/<rank>.jsonl.gz; none where the task kept none."""
        name = f"{rank:05d}.jsonl.gz"
        self.files = [name] if (self.folder / name).is_file() else []
        self.quarantine_file = None
        for name in self.files:
            # damage of our own files is an error, not a drop
            yield from self.read_files_shard([name])


def row_of(self: JsonlWriter, document: Document) -> dict[str, Any]:
    """A clean document on disk: text, id, the group that decides its split, and its address where
    it has one.

    Without a group of its own a document is its own group, by its text: copies stay on one side of
    the split.
    """
    group = document.metadata.get("group") or hashlib.sha256(document.text.encode()).hexdigest()
    row = {
        "text": document.text,
        "id": document.id,
        "group": str(group),
        "url": document.metadata.get("url"),
    }
    return {key: value for key, value in row.items() if value is not None}


def write_documents(folder: Path) -> JsonlWriter:
    """The last step of a pass."""
    return JsonlWriter(str(folder), adapter=row_of)


def write_excluded(folder: Path, reason: str) -> JsonlWriter:
    """A writer of what a step drops, with the reason; `reason` is for steps that give none."""

    def excluded(self: JsonlWriter, document: Document) -> dict[str, Any]:
        return {**row_of(self, document), "reason": document.metadata.get("filter_reason", reason)}

    return JsonlWriter(str(folder), adapter=excluded)


def exclude_into(folder: Path, pipeline: list[PipelineStep]) -> list[PipelineStep]:
    """Make steps write the documents they drop to `folder`/<place in the pipeline>-<name>."""
    for place, step in enumerate(pipeline):
        if hasattr(step, "exclusion_writer"):
            name = "".join(
                c
                for c in step.name.lower().replace(" ", "-")
                if c.isascii() and (c.isalnum() or c == "-")
            )
            step.exclusion_writer = write_excluded(
                folder / f"{place:02d}-{name.strip('-')}", name.strip("-")
            )
    return pipeline
