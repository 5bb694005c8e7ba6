"""Instruction data: prompts and answers written out as one plain text each.

Known shapes of a row: messages or conversations (lists of turns), instruction/input/output,
prompt/response and question/answer, inputs/targets. assumed: turns are headed User: and Assistant:,
since no source tells the template.
"""

from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes.filters import Plausible
from data.recipes.readers import Counted, open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1
HEADS = {
    "system": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
}
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("inputs", "targets"),
    ("question", "response"),
)


def written_out(row: dict[str, Any]) -> str | None:
    """One text, every turn under its head, an answer last; None for unknown shapes, empty turns."""
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list):
        pairs = [
            (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
            for turn in turns
        ]
    elif isinstance(row.get("instruction"), str):
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        pairs = [("user", prompt), ("assistant", row.get("output", row.get("response")))]
    else:
        keys = next(
            (pair for pair in PAIRS if all(isinstance(row.get(key), str) for key in pair)), None
        )
        if keys is None:
            return None
        pairs = [("user", row[keys[0]]), ("assistant", row[keys[1]])]
    usable = all(role in HEADS and isinstance(text, str) and text.strip() for role, text in pairs)
    if not usable or not pairs or HEADS[pairs[-1][0]] != "Assistant":
        return None
    return "\n\n".join(f"{HEADS[role]}: {text.strip()}" for role, text in pairs) + "\n"


def as_documents(reader: Counted) -> Counted:
    """The same reader, which makes rows into texts before it asks whether they have one."""
    plain = reader.get_document_from_dict

    def convert(data: Any, source_file: str, id_in_file: int | str) -> Document | None:
        if isinstance(data, dict) and not data.get(reader.text_key):
            try:
                text = written_out(data)
            except AttributeError:  # a turn that is no object
                text = None
            if text is None:
                reader.drop("unknown_shape", f"{source_file}:{id_in_file}", data)
                return None
            kept = {key: data[key] for key in ("id", "group", "url") if data.get(key)}
            data = {**kept, reader.text_key: text}
        return plain(data, source_file, id_in_file)

    reader.get_document_from_dict = convert  # type: ignore[method-assign]
    return reader


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    return [
        as_documents(open_input(source, folder)),
        Plausible(min_chars=20, min_letters=0.2, max_line=1_000_000),
    ]
