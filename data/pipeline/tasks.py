"""One pipeline task: what a worker process runs, reads and writes.

A task is the unit of resuming. It is complete if datatrove's completion mark exists; otherwise it
runs again from the start and overwrites its output.
"""

import hashlib
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.stats import PipelineStats

from core.files import sync_filesystem
from data.readers.inputs import DocumentReader


class SingleTaskExecutor(LocalPipelineExecutor):
    """Runs one task in this process, in place of datatrove's process pool and its manager."""

    def run(self) -> PipelineStats:
        """Statistics of the task, empty if it was complete before."""
        # with local_rank 0 datatrove logs to the terminal, with any other only errors
        return self._run_for_rank(self.local_rank_offset, local_rank=1)

    def mark_rank_as_completed(self, rank: int) -> None:
        """Mark the task when its output is on disk: a mark is believed after a power cut too."""
        sync_filesystem(Path(self.logging_dir.path))
        super().mark_rank_as_completed(rank)


def run_task(pipeline: list[PipelineStep], logs: Path, rank: int, tasks: int) -> None:
    """Run task `rank` of `tasks` of a pipeline, unless `logs` marks it as complete."""
    SingleTaskExecutor(
        pipeline, tasks=tasks, local_tasks=1, local_rank_offset=rank, logging_dir=str(logs)
    ).run()


class Documents(DocumentReader):
    """Reads the clean documents that the task of the same rank wrote in the previous pass."""

    name = "Documents"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), [])
        self.folder = folder

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        """Documents of `folder`/<rank>.jsonl.gz; none if the task wrote no file."""
        name = f"{rank:05d}.jsonl.gz"
        self.files = [name] if (self.folder / name).is_file() else []
        for name in self.files:
            # a damaged file of our own is an error, not a dropped document
            yield from self.read_files_shard([name])


def document_row(self: JsonlWriter, document: Document) -> dict[str, Any]:
    """A clean document on disk: text, id, the group that decides its split, and its URL if known.

    A document without a group gets the hash of its text, so that copies are in the same split.
    """
    group = document.metadata.get("group") or hashlib.sha256(document.text.encode()).hexdigest()
    row = {
        "text": document.text,
        "id": document.id,
        "group": str(group),
        "url": document.metadata.get("url"),
    }
    return {key: value for key, value in row.items() if value is not None}


def document_writer(folder: Path) -> JsonlWriter:
    """The last step of a pass that writes documents."""
    return JsonlWriter(str(folder), adapter=document_row)


def excluded_writer(folder: Path, reason: str) -> JsonlWriter:
    """Writer of the documents that a step drops; `reason` applies where the step records none."""

    def excluded_row(self: JsonlWriter, document: Document) -> dict[str, Any]:
        return {
            **document_row(self, document),
            "reason": document.metadata.get("filter_reason", reason),
        }

    return JsonlWriter(str(folder), adapter=excluded_row)


def set_exclusion_writers(folder: Path, pipeline: list[PipelineStep]) -> list[PipelineStep]:
    """Have steps write the documents that they drop to `folder`/<index of the step>-<name>."""
    for index, step in enumerate(pipeline):
        if hasattr(step, "exclusion_writer"):
            name = "".join(
                c
                for c in step.name.lower().replace(" ", "-")
                if c.isascii() and (c.isalnum() or c == "-")
            ).strip("-")
            step.exclusion_writer = excluded_writer(folder / f"{index:02d}-{name}", name)
    return pipeline
