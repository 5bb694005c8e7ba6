"""Forums (Reddit, StackExchange, Hacker News): one document per conversation, in causal order.

A message comes after its parent, and siblings come in order of time; every message is in exactly
one document. Input: one row per conversation with `messages`, or one row per message with `thread`
(Reddit's link_id), with consecutive rows for each conversation. A message has id, parent (or
parent_id), text (or body) and, if known, author, created (or created_utc) and title.
"""

import heapq
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.inputs import DocumentReader, open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson",)
RECIPE_VERSION = 1
DELETED = ("[deleted]", "[removed]", "")
Message = dict[str, Any]


def first_value(row: Message, *keys: str) -> Any:
    """Return the value of the first key that is present and not None, else None."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def message_id(message: Message) -> str:
    """Message id without Reddit's type prefix."""
    name = str(first_value(message, "id", "name"))
    return name[3:] if name[:3] in ("t1_", "t3_") else name


def parent_id(message: Message) -> str | None:
    """Id of the message that this one answers."""
    name = first_value(message, "parent", "parent_id")
    return None if name is None else message_id({"id": name})


def sort_key(message: Message) -> tuple[bool, Any, str]:
    """Key that sorts by time, then by id; messages without a time come last."""
    time = first_value(message, "created", "created_utc", "time", "creation_date")
    return (
        time is None,
        str(time) if isinstance(time, str) else f"{float(time or 0):020.3f}",
        message_id(message),
    )


def linearize(messages: Iterable[Message]) -> list[Message]:
    """Order messages depth first: each once, after its parent, siblings and roots by time.

    A message with an unknown parent is a root. A cycle of parents, which a broken dump may have,
    starts at its earliest message.
    """
    by_id: dict[str, Message] = {}
    for message in messages:
        by_id.setdefault(message_id(message), message)
    children: dict[str | None, list[Message]] = {}
    for message in by_id.values():
        parent = parent_id(message)
        is_known = parent in by_id and parent != message_id(message)
        children.setdefault(parent if is_known else None, []).append(message)
    ordered: list[Message] = []
    visited: set[str] = set()
    roots = sorted(children.get(None, []), key=sort_key)
    earliest = [(sort_key(message), key) for key, message in by_id.items()]
    heapq.heapify(earliest)
    while len(visited) < len(by_id):
        if not roots:  # only cycles remain
            roots = [by_id[heapq.heappop(earliest)[1]]]
        stack = roots[::-1]
        roots = []
        while stack:
            message = stack.pop()
            key = message_id(message)
            if key not in visited:
                visited.add(key)
                ordered.append(message)
                stack += sorted(children.get(key, []), key=sort_key, reverse=True)
    return ordered


def render_conversation(messages: list[Message]) -> str:
    """Title, then every message that has text, with its author if known."""
    title = next((str(message["title"]) for message in messages if message.get("title")), None)
    paragraphs = [] if title is None else [title]
    for message in messages:
        text = first_value(message, "text", "body", "selftext", "content")
        if isinstance(text, str) and text.strip() not in DELETED:
            author = message.get("author")
            has_author = author is not None and author not in DELETED
            paragraphs.append(f"{author}: {text.strip()}" if has_author else text.strip())
    return "\n\n".join(paragraphs)


class ConversationReader(DocumentReader):
    """Reads one document per conversation; drops rows of a thread that appears again later.

    Memory: one conversation, and 8 bytes per conversation of the current file.
    """

    name = "Conversations"

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one file."""
        make_document = super().get_document_from_dict
        finished: set[int] = set()  # hashes of thread ids
        for thread, group in groupby(self.read_messages(filepath), key=lambda row: row[1]):
            rows = list(group)
            messages = [message for _, _, message in rows]
            first_row = rows[0][0]
            if hash(thread) in finished:
                self.drop("scattered", f"{filepath}:{first_row}", messages)
                continue
            finished.add(hash(thread))
            text = render_conversation(linearize(messages))
            row = {self.text_key: text, "id": thread, "group": thread}
            document = make_document(row, filepath, first_row)
            if document is not None:
                yield document

    def read_messages(self, filepath: str) -> Iterator[tuple[int, str, Message]]:
        """Yield (row index, thread, message) in file order; other rows are dropped as corrupt."""
        for index, row in self.rows(filepath):
            where = f"{filepath}:{index}"
            nested = row.get("messages") if isinstance(row, dict) else None
            if isinstance(nested, list) and all(
                isinstance(m, dict) and first_value(m, "id", "name") for m in nested
            ):
                thread = str(first_value(row, "id", "thread") or where)
                head = {"title": row["title"]} if row.get("title") and nested else {}
                yield from ((index, thread, {**head, **m} if m is nested[0] else m) for m in nested)
                if not nested:
                    self.drop("empty", where, row)
            elif (
                isinstance(row, dict)
                and first_value(row, "thread", "link_id")
                and first_value(row, "id", "name")
            ):
                yield index, str(first_value(row, "thread", "link_id")), row
            else:
                self.drop("corrupt", where, row)


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    reader = open_input(
        source,
        folder,
        reader_class=ConversationReader,
        columns=None,
        instead_of_text=("messages", "thread", "link_id"),
    )
    return [reader, BasicQualityFilter(min_chars=100, min_letters=0.4, max_line=100_000)]
