"""Instruction data: prompts and answers rendered as plain text.

Known row formats: messages or conversations (lists of turns), instruction/input/output,
prompt/response, question/answer and inputs/targets. assumed: turns begin with User: and Assistant:,
since no source gives the template.
"""

from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.base import CountingReader
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson",)
RECIPE_VERSION = 1
ROLE_NAMES = {
    "system": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
}
PROMPT_AND_ANSWER_KEYS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("inputs", "targets"),
    ("question", "response"),
)

# of which a row has one; the others belong to it
PROMPT_KEYS = ("messages", "conversations", "instruction", "prompt", "question", "inputs")


def render_turns(row: dict[str, Any]) -> str | None:
    """Render a row as text; None if its format is unknown, a turn is empty or no answer is last."""
    messages = row.get("messages") or row.get("conversations")
    if isinstance(messages, list):
        turns = [
            (message.get("role", message.get("from")), message.get("content", message.get("value")))
            for message in messages
        ]
    elif isinstance(row.get("instruction"), str):
        prompt = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
        turns = [("user", prompt), ("assistant", row.get("output", row.get("response")))]
    else:
        keys = next(
            (
                keys
                for keys in PROMPT_AND_ANSWER_KEYS
                if all(isinstance(row.get(key), str) for key in keys)
            ),
            None,
        )
        if keys is None:
            return None
        turns = [("user", row[keys[0]]), ("assistant", row[keys[1]])]
    is_valid = all(
        role in ROLE_NAMES and isinstance(text, str) and text.strip() for role, text in turns
    )
    if not is_valid or not turns or ROLE_NAMES[turns[-1][0]] != "Assistant":
        return None
    return "\n\n".join(f"{ROLE_NAMES[role]}: {text.strip()}" for role, text in turns) + "\n"


def render_rows(reader: CountingReader) -> CountingReader:
    """Make a reader render rows as text before it checks that they have any."""
    make_document = reader.get_document_from_dict

    def convert(data: Any, source_file: str, id_in_file: int | str) -> Document | None:
        if isinstance(data, dict) and not data.get(reader.text_key):
            try:
                text = render_turns(data)
            except AttributeError:  # a turn that is not an object
                text = None
            if text is None:
                reader.drop("unknown_shape", f"{source_file}:{id_in_file}", data)
                return None
            metadata = {key: data[key] for key in ("id", "group", "url") if data.get(key)}
            data = {**metadata, reader.text_key: text}
        return make_document(data, source_file, id_in_file)

    reader.get_document_from_dict = convert  # type: ignore[method-assign]
    return reader


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    reader = open_input(source, folder, columns=None, instead_of_text=PROMPT_KEYS)
    return [
        render_rows(reader),
        BasicQualityFilter(min_chars=20, min_letters=0.2, max_line=1_000_000),
    ]
