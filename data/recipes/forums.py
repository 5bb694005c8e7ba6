"""Forums (Reddit, StackExchange, Hacker News): conversation trees written out in causal order, each
used once.

A message comes after the one it answers, and answers to one message in the order of time; every
message stands in exactly one document. Input: a row per conversation with `messages`, or a row per
message with `thread` (Reddit's link_id), the rows of one conversation one after another. A message
has id, parent (or parent_id), text (or body) and, where known, author, created (or created_utc) and
title.
"""

import heapq
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes.filters import Plausible
from data.recipes.readers import Counted, Jsonl, Parquet, open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1
GONE = ("[deleted]", "[removed]", "")
Message = dict[str, Any]


def first_of(row: Message, *keys: str) -> Any:
    """The first value that is there."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def number(message: Message) -> str:
    """Identifier without Reddit's prefix of its kind."""
    name = str(first_of(message, "id", "name"))
    return name[3:] if name[:3] in ("t1_", "t3_") else name


def parent_of(message: Message) -> str | None:
    """Identifier of the message it answers."""
    name = first_of(message, "parent", "parent_id")
    return None if name is None else number({"id": name})


def when(message: Message) -> tuple[bool, Any, str]:
    """Sorts by time, messages without one last, then by identifier."""
    time = first_of(message, "created", "created_utc", "time", "creation_date")
    return (
        time is None,
        str(time) if isinstance(time, str) else f"{float(time or 0):020.3f}",
        number(message),
    )


def linearised(messages: Iterable[Message]) -> list[Message]:
    """Every message once, after its parent, siblings by time; roots and those whose parent is
    unknown by time.

    A circle of parents, which no forum makes but a broken dump may hold, is opened at its earliest
    message.
    """
    by_id: dict[str, Message] = {}
    for message in messages:
        by_id.setdefault(number(message), message)
    children: dict[str | None, list[Message]] = {}
    for message in by_id.values():
        parent = parent_of(message)
        known = parent in by_id and parent != number(message)
        children.setdefault(parent if known else None, []).append(message)
    order: list[Message] = []
    seen: set[str] = set()
    pending = sorted(children.get(None, []), key=when)
    left = [(when(message), key) for key, message in by_id.items()]
    heapq.heapify(left)
    while len(seen) < len(by_id):
        if not pending:  # what remains is circles
            pending = [by_id[heapq.heappop(left)[1]]]
        stack = pending[::-1]
        pending = []
        while stack:
            message = stack.pop()
            if number(message) not in seen:
                seen.add(number(message))
                order.append(message)
                stack += sorted(children.get(number(message), []), key=when, reverse=True)
    return order


def written_out(messages: list[Message]) -> str:
    """The conversation as text: title, then every message with text, under its author if given."""
    title = next((str(message["title"]) for message in messages if message.get("title")), None)
    parts = [] if title is None else [title]
    for message in messages:
        text = first_of(message, "text", "body", "selftext", "content")
        if isinstance(text, str) and text.strip() not in GONE:
            author = message.get("author")
            named = author is not None and author not in GONE
            parts.append(f"{author}: {text.strip()}" if named else text.strip())
    return "\n\n".join(parts)


class Conversations(Counted):
    """Mixin: rows become conversations, one document each; a conversation that comes back later is
    dropped whole.

    Its memory is one conversation, and 8 bytes per conversation of the file that is read.
    """

    name = "Conversations"

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Documents of one file."""
        plain = super().get_document_from_dict
        used: set[int] = set()
        for thread, rows in groupby(self.messages(filepath), key=lambda row: row[1]):
            found = list(rows)
            where = f"{filepath}:{found[0][0]}"
            if hash(thread) in used:
                self.drop("scattered", where, [message for _, _, message in found])
                continue
            used.add(hash(thread))
            text = written_out(linearised(message for _, _, message in found))
            document = plain({"text": text, "id": thread, "group": thread}, filepath, found[0][0])
            if document is not None:
                yield document

    def messages(self, filepath: str) -> Iterator[tuple[int, str, Message]]:
        """(row, conversation, message) in the file's order; drops other rows as corrupt."""
        for index, row in self.rows(filepath):
            where = f"{filepath}:{index}"
            nested = row.get("messages") if isinstance(row, dict) else None
            if isinstance(nested, list) and all(
                isinstance(m, dict) and first_of(m, "id", "name") for m in nested
            ):
                thread = str(first_of(row, "id", "thread") or where)
                head = {"title": row["title"]} if row.get("title") and nested else {}
                yield from ((index, thread, {**head, **m} if m is nested[0] else m) for m in nested)
                if not nested:
                    self.drop("empty", where, row)
            elif (
                isinstance(row, dict)
                and first_of(row, "thread", "link_id")
                and first_of(row, "id", "name")
            ):
                yield index, str(first_of(row, "thread", "link_id")), row
            else:
                self.drop("corrupt", where, row)


class JsonlConversations(Conversations, Jsonl):
    """From jsonl."""


class ParquetConversations(Conversations, Parquet):
    """From parquet."""

    def rows(self, filepath: str) -> Iterator[tuple[int, Any]]:
        """(row number, row) of one file."""
        import pyarrow.parquet

        with (
            self.data_folder.open(filepath, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            index = 0
            for batch in file.iter_batches(self.batch_size):
                for row in batch.to_pylist():
                    yield index, row
                    index += 1


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    plain = open_input(source, folder)
    reader: Counted = (JsonlConversations if isinstance(plain, Jsonl) else ParquetConversations)(
        source.input
    )
    reader.files, reader.quarantine = plain.files, plain.quarantine
    return [reader, Plausible(min_chars=100, min_letters=0.4, max_line=100_000)]
