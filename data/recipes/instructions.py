"""Instruction data: prompts and answers rendered as plain text.

Text that has all other fields of its row is used as it is. Another row is a list of turns, or a
prompt with its answer; whatever the answer answers is rendered too:

    turns     messages or conversations (or `text_key`): role and content, or from and value
    system    system, system_prompt or system_message
    history   earlier [prompt, answer] pairs
    prompt    instruction, prompt, question, inputs, inputs_pretokenized, query or problem
    its parts input, context, passage, document, article, options, choices
    answer    output, response, completion, targets, targets_pretokenized, solution, answer, answers

Content may be a list of text parts. A field with another name is metadata if it is a label or
repeats rendered text. With text of its own (over MAX_LABEL_WORDS words), which may be a part of the
prompt, it drops the row: rename it to one of the names above, or remove it.
Drop reasons: unknown_shape (also pairs of a chosen and a rejected answer), unknown_field,
unknown_role, tool_use, not_text (images, sound), empty_turn, no_answer (a user's turn is last),
single_turn (the row is one message of a conversation).
assumed: turns begin with User: and Assistant:, since no source gives the template.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.base import CountingReader
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson",)
# 2: all parts of a prompt are rendered, rows with unknown text are dropped, more roles and contents
RECIPE_VERSION = 2
ROLES = {
    "System": ("system", "developer"),
    "User": ("user", "human", "prompter"),
    "Assistant": ("assistant", "gpt", "model", "bot", "bing", "bard", "chatgpt"),
}
ROLE_NAMES = {role: name for name, roles in ROLES.items() for role in roles}
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
TURNS_KEYS = ("messages", "conversations", "conversation")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
PROMPT_KEYS = (
    *("instruction", "prompt", "question", "inputs", "inputs_pretokenized", "query", "problem"),
)
PART_KEYS = ("input", "context", "passage", "document", "article")
OPTION_KEYS = ("options", "choices")
TEXT_PARTS = (None, "text", "input_text", "output_text")
ANSWER_KEYS = (
    *("output", "response", "completion", "targets", "targets_pretokenized"),
    *("solution", "answer", "answers"),  # a solution ends with the answer
)
RENDERED = (*TURNS_KEYS, *SYSTEM_KEYS, *PROMPT_KEYS, *PART_KEYS, *OPTION_KEYS, *ANSWER_KEYS)
MAX_LABEL_WORDS = 5
# may be long and are no part of a prompt
METADATA = ("id", "group", "url", "metadata", "meta", "title", "source", "license", "answers")
Turn = tuple[str, str]  # name as rendered, text


class UnusableRowError(Exception):
    """A row that cannot be rendered; its message is the drop reason."""


def render_row(row: dict[str, Any], text_key: str = "text") -> str:
    """Render a row as text, or return its text. Raises UnusableRowError with the reason."""
    text = row.get(text_key)
    if isinstance(text, str) and text.strip():
        return check_text(row, text)
    lists = (row[key] for key in (text_key, *TURNS_KEYS) if isinstance(row.get(key), list))
    items = next(filter(None, lists), None)
    turns = prompt_and_answer(row) if items is None else [read_turn(item) for item in items]
    turns = [turn for turn in turns if turn[1] or turn[0] != "System"]
    if not turns or turns[0][0] != "System":
        turns = [("System", text) for text in texts_of(row, SYSTEM_KEYS)[:1]] + turns
    if not all(text for _, text in turns):
        raise UnusableRowError("empty_turn")
    if not turns or turns[-1][0] != "Assistant":
        raise UnusableRowError("no_answer")
    text = "\n\n".join(f"{name}: {text}" for name, text in turns) + "\n"
    if has_other_text(row, text):
        raise UnusableRowError("unknown_field")
    return text


def check_text(row: dict[str, Any], text: str) -> str:
    """Return the text of a row unless it is a part of what the row holds."""
    if any(str(row.get(key)).strip().lower() in ROLE_NAMES for key in ("role", "from")):
        raise UnusableRowError("single_turn")
    parts = set(strings_in([row.get(key) for key in RENDERED if key not in METADATA]))
    if any(part not in text for part in parts - ROLE_NAMES.keys()) or has_other_text(row, text):
        raise UnusableRowError("unknown_field")
    return text


def read_turn(turn: Any) -> Turn:
    """Return the name and the text of an item in a list of turns."""
    if not isinstance(turn, dict):
        raise UnusableRowError("unknown_shape")
    role = str(first_value(turn, "role", "from")).strip().lower()
    if role in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise UnusableRowError("tool_use")
    if role not in ROLE_NAMES:
        raise UnusableRowError("unknown_role")
    return ROLE_NAMES[role], content_text(first_value(turn, "content", "value"))


def content_text(content: Any) -> str:
    """Return a turn's text: a text, None for an empty turn, or a list of text parts."""
    if isinstance(content, list):
        return "\n\n".join(filter(None, map(part_text, content)))
    if content is not None and not isinstance(content, str):
        raise UnusableRowError("unknown_shape")
    return (content or "").strip()


def part_text(part: Any) -> str:
    """Return the text of a part of a turn, such as {"type": "text", "text": ...}."""
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str) or (isinstance(part, dict) and part.get("type") not in TEXT_PARTS):
        raise UnusableRowError("not_text")
    return text.strip()


def prompt_and_answer(row: dict[str, Any]) -> list[Turn]:
    """Return the turns of a row with a prompt and an answer."""
    prompts = [key for key in PROMPT_KEYS if isinstance(row.get(key), str)]
    answers = [row[key] for key in ANSWER_KEYS if is_answer(row.get(key))]
    pairs = row.get("history") or []
    if not prompts or not answers or not isinstance(pairs, list) or not all(map(is_pair, pairs)):
        raise UnusableRowError("unknown_shape")
    turns = [turn for pair in pairs for turn in (("User", pair[0]), ("Assistant", pair[1]))]
    parts = texts_of(row, (*prompts, *PART_KEYS, *OPTION_KEYS))
    prompt = "\n\n".join(dict.fromkeys(parts))
    answer = next(filter(None, answers), answers[0])
    if isinstance(answer, dict):  # SQuAD: the answers of several readers, or of none
        answer = answer["text"]
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    if not isinstance(answer, str):
        raise UnusableRowError("no_answer")
    return [
        (name, text.strip()) for name, text in (*turns, ("User", prompt), ("Assistant", answer))
    ]


def is_answer(value: Any) -> bool:
    """Whether a value has the form of an answer: a text, or SQuAD's list of them."""
    if isinstance(value, dict):
        value = value.get("text")
    return isinstance(value, str | list)


def is_pair(value: Any) -> bool:
    """Whether a value is a prompt with its answer."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def texts_of(row: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Return the texts of the fields that are not empty; options are lettered."""
    texts = []
    for key in keys:
        value = row.get(key)
        if isinstance(value, dict):  # ARC: {"text": [...], "label": [...]}
            value = value.get("text", value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            if key in OPTION_KEYS:
                value = "\n".join(f"{chr(65 + i)}. {item.strip()}" for i, item in enumerate(value))
            else:
                value = "\n\n".join(item.strip() for item in value)
        if value is not None and not isinstance(value, str):
            raise UnusableRowError("unknown_shape")
        texts.append((value or "").strip())
    return [text for text in texts if text]


def has_other_text(row: dict[str, Any], text: str) -> bool:
    """Whether a field has text, more than a label, that is not in the rendered text."""
    values = [value for name, value in row.items() if name not in METADATA]
    return any(len(one.split()) > MAX_LABEL_WORDS and one not in text for one in strings_in(values))


def strings_in(value: Any) -> Iterator[str]:
    """Yield the strings in a value at any depth, without the space around them."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def first_value(row: dict[str, Any], *keys: str) -> Any:
    """Return the value of the first key that is present and not None, else None."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def render_rows(reader: CountingReader) -> CountingReader:
    """Make a reader render rows as text before it checks that they have any."""
    make_document = reader.get_document_from_dict

    def convert(data: Any, source_file: str, id_in_file: int | str) -> Document | None:
        if isinstance(data, dict) and isinstance(data.get(reader.text_key), str | list | None):
            try:
                text = render_row(data, reader.text_key)
            except UnusableRowError as error:
                reader.drop(str(error), f"{source_file}:{id_in_file}", data)
                return None
            metadata = {key: data[key] for key in ("id", "group", "url") if data.get(key)}
            data = {**metadata, reader.text_key: text}
        return make_document(data, source_file, id_in_file)

    reader.get_document_from_dict = convert  # type: ignore[method-assign]
    return reader


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    reader = open_input(source, folder, columns=None, instead_of_text=(*TURNS_KEYS, *PROMPT_KEYS))
    return [
        render_rows(reader),
        BasicQualityFilter(min_chars=20, min_letters=0.2, max_line=1_000_000),
    ]
