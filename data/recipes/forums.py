"""Forums (Reddit, StackExchange, Hacker News): one document per conversation, in causal order.

A message comes after its parent, and siblings come in order of time; every message is in exactly
one document. Input: one row per conversation with `messages`, before which its own title and text
come, or one row per message with its thread, with consecutive rows for each conversation. A row
with messages under other names (REPLY_KEYS) is dropped as nested_replies. Fields by source:

    any             thread, id, parent or parent_id; text; author, created, title
    Reddit          link_id, id or name, parent_id; body or selftext; author, created_utc, title
    Hacker News     thread, id, parent; text; by, time, title
    its search      story_id, objectID, parent_id; comment_text or story_text; author, created_at_i
    StackExchange   Id, ParentId, PostTypeId; Body; OwnerDisplayName, CreationDate, Title

Reddit numbers submissions (t3_) and comments (t1_) apart. An id without prefix is a submission's if
the row has a title or selftext and no parent; the thread of a submission without link_id is itself.
A message given again with the same text is written once; with another text it is a message too.
"""

import heapq
import math
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.inputs import DocumentReader, open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson",)
# 2: ids keep their type, times of every form are compared, fields of StackExchange's dumps are read
RECIPE_VERSION = 2
DELETED = ("[deleted]", "[removed]", "")
ID_KEYS = ("name", "id", "Id", "objectID")
PARENT_KEYS = ("parent", "parent_id", "ParentId")
TEXT_KEYS = ("text", "body", "selftext", "content", "Body", "comment_text", "story_text")
REPLY_KEYS = ("comments", "replies", "children", "answers")
TITLE_KEYS = ("title", "Title")
AUTHOR_KEYS = ("author", "by", "OwnerDisplayName")
TIME_KEYS = (
    *("created", "created_utc", "time", "creation_date", "CreationDate"),
    *("created_at_i", "created_at"),
)
SUBMISSION, COMMENT = "t3", "t1"
TYPED_ID = re.compile(f"({SUBMISSION}|{COMMENT})_(.+)")
# The unit of a time follows from its size: seconds below 1e11 (until the year 5138), then
# milliseconds, microseconds and nanoseconds, each from 1973 on.
TIME_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))
Message = dict[str, Any]
Key = tuple[str, str]  # type (SUBMISSION, COMMENT or "") and id


def first_value(row: Message, *keys: str) -> Any:
    """Return the value of the first key that is present and not None or "", else None."""
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def id_text(value: Any) -> str | None:
    """Return an id as text; None if it is none. 7.0, as tables with gaps have it, is 7."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def typed_key(text: str) -> Key:
    """Split Reddit's prefix from an id; "" is the type of an id without one."""
    match = TYPED_ID.fullmatch(text)
    return ("", text) if match is None else (match[1], match[2])


def message_key(message: Message) -> Key | None:
    """Type and id of a message; None without an id. See the module for ids without a prefix."""
    ids = [text for name in ID_KEYS if (text := id_text(first_value(message, name))) is not None]
    keys = [typed_key(text) for text in ids]
    key = next((key for key in keys if key[0]), keys[-1] if keys else None)
    if key is None or key[0] or not is_reddit(message):
        return key
    is_submission = any(message.get(name) for name in ("title", "selftext"))
    is_answer = first_value(message, *PARENT_KEYS) is not None
    return (SUBMISSION if is_submission and not is_answer else COMMENT), key[1]


def is_reddit(message: Message) -> bool:
    """Whether a message has fields that only Reddit's dumps have."""
    parent = id_text(first_value(message, *PARENT_KEYS))
    return (
        "link_id" in message
        or "selftext" in message
        or (parent is not None and typed_key(parent)[0] != "")
    )


def parent_keys(message: Message) -> list[Key]:
    """Keys that the answered message may have, the likeliest first."""
    text = id_text(first_value(message, *PARENT_KEYS))
    if text is None:
        return []
    kind, name = typed_key(text)
    kinds = (kind, "") if kind else ("", COMMENT, SUBMISSION)
    return [(each, name) for each in kinds]


def thread_of(row: Message) -> str | None:
    """Id of the conversation that a message's row belongs to, None if the row does not say."""
    thread = id_text(first_value(row, "thread", "story_id"))
    if thread is None and first_value(row, *PARENT_KEYS) is None:
        thread = id_text(first_value(row, "objectID"))
    if thread is not None:
        return thread
    if (link := id_text(first_value(row, "link_id"))) is not None:
        return link if typed_key(link)[0] else f"{SUBMISSION}_{link}"
    post_type = id_text(first_value(row, "PostTypeId"))  # 1: a question, 2: an answer
    if post_type is not None:
        return id_text(first_value(row, {"1": "Id", "2": "ParentId"}.get(post_type, "thread")))
    key = message_key(row)
    return f"{SUBMISSION}_{key[1]}" if key is not None and key[0] == SUBMISSION else None


def seconds(time: Any) -> float | None:
    """Return a time as seconds since 1970; None if it is none.

    `time`: a number, a number as text, ISO 8601, the form of mail (RFC 5322), or a datetime. A time
    without a zone is UTC's.
    """
    if isinstance(time, str):
        time = parse_time(time.strip())
    if isinstance(time, date):
        if not isinstance(time, datetime):
            time = datetime(time.year, time.month, time.day)
        time = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
    if not isinstance(time, int | float) or isinstance(time, bool) or not 0 <= time < 1e20:
        return None  # also NaN
    return next(float(time) / unit for limit, unit in TIME_UNITS if time < limit)


def parse_time(text: str) -> float | datetime | None:
    """Return a written time as a number or a datetime, None if it has no known form."""
    try:
        return float(text)
    except ValueError:
        pass
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return parse(text.removesuffix(" UTC"))
        except (ValueError, OverflowError, TypeError, IndexError):  # parsedate_to_datetime's
            continue
    return None


def sort_key(message: Message, position: int) -> tuple[float, int, str, int]:
    """Key that sorts by time, then by id and input order; messages without a time come last."""
    time = seconds(first_value(message, *TIME_KEYS))
    _, name = message_key(message) or ("", "")
    # numbers and Reddit's ids grow with time: the shorter one is older
    return math.inf if time is None else time, len(name), name, position


def is_message(row: Any) -> bool:
    """Whether a value is an object with an id, and with text or no text."""
    return isinstance(row, dict) and message_key(row) is not None and has_text_or_none(row)


def has_text_or_none(row: Message) -> bool:
    """Whether the value under a row's key of text is not of another type."""
    return isinstance(first_value(row, *TEXT_KEYS), str | None)


def has_replies(row: Any) -> bool:
    """Whether a row or a message has messages inside that are not read."""
    values = [row.get(key) for key in REPLY_KEYS] if isinstance(row, dict) else []
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return any(isinstance(item, dict) for item in items)


def opening(row: Message, messages: list[Message]) -> Message:
    """Title and text of a conversation's row as its first message, which may be repeated."""
    text = first_value(row, *TEXT_KEYS)
    if any(first_value(message, *TEXT_KEYS) == text for message in messages):
        text = None
    title = first_value(row, *TITLE_KEYS)
    return {"title": title, "text": text, "author": first_value(row, *AUTHOR_KEYS), "created": 0}


def unique(messages: Iterable[Message]) -> list[Message]:
    """Messages without those that have the id and the text of an earlier one."""
    found: dict[tuple[Key | None, str], Message] = {}
    for message in messages:
        text = str(first_value(message, *TEXT_KEYS))
        found.setdefault((message_key(message), text), message)
    return list(found.values())


def linearize(messages: Iterable[Message]) -> list[Message]:
    """Order messages depth first: each once, after its parent, siblings and roots by time.

    A message with an unknown parent is a root. A cycle of parents, which a broken dump may have,
    starts at its earliest message.
    """
    nodes = unique(messages)
    by_key: dict[Key | None, int] = {}
    for node, message in enumerate(nodes):
        by_key.setdefault(message_key(message), node)
    order = [sort_key(message, node) for node, message in enumerate(nodes)]
    children: dict[int | None, list[int]] = {}
    for node, message in enumerate(nodes):
        parent = next((by_key[key] for key in parent_keys(message) if key in by_key), None)
        children.setdefault(None if parent == node else parent, []).append(node)
    ordered: list[Message] = []
    visited: set[int] = set()
    roots = sorted(children.get(None, []), key=order.__getitem__)
    earliest = list(zip(order, range(len(nodes)), strict=True))
    heapq.heapify(earliest)
    while len(visited) < len(nodes):
        if not roots:  # only cycles remain
            roots = [heapq.heappop(earliest)[1]]
        stack = roots[::-1]
        roots = []
        while stack:
            node = stack.pop()
            if node not in visited:
                visited.add(node)
                ordered.append(nodes[node])
                stack += sorted(children.get(node, []), key=order.__getitem__, reverse=True)
    return ordered


def render_conversation(messages: list[Message]) -> str:
    """Title, then every message that has text, with its author if known."""
    titles = (first_value(message, *TITLE_KEYS) for message in messages)
    paragraphs = [str(title) for title in titles if title is not None][:1]
    for message in messages:
        text = first_value(message, *TEXT_KEYS)
        if isinstance(text, str) and text.strip() not in DELETED:
            author = first_value(message, *AUTHOR_KEYS)
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
            if any(map(has_replies, [row, *(nested if isinstance(nested, list) else [])])):
                self.drop("nested_replies", where, row)
            elif (
                isinstance(nested, list) and has_text_or_none(row) and all(map(is_message, nested))
            ):
                thread = first_value(row, "id", "thread", "Id")
                thread = where if id_text(thread) is None else str(id_text(thread))
                first = opening(row, nested)
                if not nested and first["text"] is None:
                    self.drop("empty", where, row)
                    continue
                yield from ((index, thread, message) for message in (first, *nested))
            elif is_message(row) and (own_thread := thread_of(row)) is not None:
                yield index, own_thread, row
            else:
                self.drop("corrupt", where, row)


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    reader = open_input(
        source,
        folder,
        reader_class=ConversationReader,
        columns=None,
        instead_of_text=("messages", "thread", "link_id", "selftext", "PostTypeId", "story_id"),
    )
    return [reader, BasicQualityFilter(min_chars=100, min_letters=0.4, max_line=100_000)]
