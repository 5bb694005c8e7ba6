"""Instructions: every answer with all that it answers, every dropped row with its reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.recipes.instructions import UnusableRowError, render_row
from tests.data.samples import make_source, run_recipe, write_rows

ASK = {"role": "user", "content": "Name a river."}
ANSWER = {"role": "assistant", "content": "The Oder."}
LONG = "The nets are mended on Sundays by the lamp keeper's sister."


def test_every_instruction_format_becomes_text(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Name a river."},
                {"role": "assistant", "content": "The Oder."},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Name a river."},
                {"from": "gpt", "value": "The Oder."},
            ]
        },
        {"instruction": "Name a river.", "input": "", "output": "The Oder."},
        {"question": "Name a river.", "answer": "The Oder."},
        {"text": "User: Name a river.\n\nAssistant: The Oder.\n"},
        {"messages": [{"role": "user", "content": "No answer."}]},
        {"messages": ["no turn"]},
        {"something": "else"},
    ]
    write_rows(tmp_path / "raw" / "a.jsonl", rows)
    kept, steps = run_recipe(make_source("instructions", tmp_path / "raw"), tmp_path / "clean")
    assert [row["text"] for row in kept] == ["User: Name a river.\n\nAssistant: The Oder.\n"] * 5
    assert steps[0].dropped == {"unknown_shape": 2, "no_answer": 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "A", "context": LONG, "response": "B"}, f"User: A\n\n{LONG}|Assistant: B"),
        ({"question": "A", "context": "C", "answer": "B"}, "User: A\n\nC|Assistant: B"),
        (
            {"system_prompt": "S", "question": "A", "response": "B", "id": "niv.1"},
            "System: S|User: A|Assistant: B",
        ),
        ({"system_prompt": " ", "question": "A", "response": "B"}, "User: A|Assistant: B"),
        ({"instruction": "A", "input": "I", "output": "B"}, "User: A\n\nI|Assistant: B"),
        ({"instruction": "A", "input": None, "output": "B"}, "User: A|Assistant: B"),
        ({"passage": "P", "question": "A", "answer": "B"}, "User: A\n\nP|Assistant: B"),
        ({"context": ["P", "Q"], "question": "A", "answer": "B"}, "User: A\n\nP\n\nQ|Assistant: B"),
        (
            {"title": "T", "context": LONG, "question": "A"}
            | {"answers": {"text": ["B", "b b b b b b b"], "answer_start": [0, 2]}},
            f"User: A\n\n{LONG}|Assistant: B",
        ),
        (
            {"question": "A", "choices": ["x", "y"], "answer": "x"},
            "User: A\n\nA. x\nB. y|Assistant: x",
        ),
        (
            {"question": "A", "options": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "x"},
            "User: A\n\nA. x\nB. y|Assistant: x",
        ),
        ({"inputs": "A", "targets": "B", "task_name": "t"}, "User: A|Assistant: B"),
        (
            {"inputs": [3, 4], "inputs_pretokenized": "A", "targets_pretokenized": "B"},
            "User: A|Assistant: B",
        ),
        ({"instruction": "A", "question": "Q", "output": "B"}, "User: A\n\nQ|Assistant: B"),
        ({"prompt": "A", "inputs": "A", "completion": "B"}, "User: A|Assistant: B"),
        ({"problem": "A", "solution": f"{LONG} B", "answer": "B"}, f"User: A|Assistant: {LONG} B"),
        (
            {"instruction": "A", "output": "B", "history": [["C", "D"]]},
            "User: C|Assistant: D|User: A|Assistant: B",
        ),
        ({"instruction": "A", "output": "B", "category": "closed_qa"}, "User: A|Assistant: B"),
        (
            {"prompt": "Name a river.", "messages": [ASK, ANSWER]},
            "User: Name a river.|Assistant: The Oder.",
        ),
        ({"messages": [], "prompt": "A", "response": "B"}, "User: A|Assistant: B"),
        (
            {
                "system": "S",
                "conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}],
            },
            "System: S|User: A|Assistant: B",
        ),
        (
            {"messages": [{"role": "system", "content": ""}, ASK, ANSWER], "system": "S"},
            "System: S|User: Name a river.|Assistant: The Oder.",
        ),
        (
            {
                "messages": [
                    {"role": " DEVELOPER ", "content": "S"},
                    ASK,
                    {"role": "Model", "content": "B"},
                ]
            },
            "System: S|User: Name a river.|Assistant: B",
        ),
        (
            {
                "messages": [
                    {**ASK, "tool_calls": None, "from": None},
                    {"role": "bot", "content": "\n B \n"},
                ]
            },
            "User: Name a river.|Assistant: B",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "C"}],
                    },
                    {"role": "bing", "content": [{"type": None, "text": "B"}]},
                ]
            },
            "User: A\n\nC|Assistant: B",
        ),
    ],
)
def test_everything_that_an_answer_answers_is_rendered(row: dict[str, Any], expected: str) -> None:
    assert render_row(row) == expected.replace("|", "\n\n") + "\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "A", "output": "B", "evidence": LONG}, "unknown_field"),
        ({"instruction": "A", "output": "B", "facts": [{"text": LONG}]}, "unknown_field"),
        ({"messages": [ASK, {**ANSWER, "reasoning": LONG}]}, "unknown_field"),
        ({"messages": [ASK, ANSWER], "tools": LONG}, "unknown_field"),
        (
            {"messages": [{"role": "system", "content": "S"}, ASK, ANSWER], "system": LONG},
            "unknown_field",
        ),
        ({"prompt": "A", "chosen": "B", "rejected": "C"}, "unknown_shape"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "unknown_shape"),
        ({"question": "A", "choices": ["x", "y"], "answer": 1}, "unknown_shape"),
        ({"question": "A", "context": {"a": 1}, "answer": "B"}, "unknown_shape"),
        ({"instruction": "A", "output": "B", "history": ["C"]}, "unknown_shape"),
        ({"conversations": ["A", "B"]}, "unknown_shape"),
        ({"messages": [{"role": "user", "content": {"a": "b"}}, ANSWER]}, "unknown_shape"),
        ({"messages": "text"}, "unknown_shape"),
        ({"answer": "B"}, "unknown_shape"),
        ({}, "unknown_shape"),
        ({"question": "A", "answers": {"text": [], "answer_start": []}}, "no_answer"),
        ({"messages": [ASK, ANSWER, ASK]}, "no_answer"),
        ({"messages": [{"role": "system", "content": "S"}]}, "no_answer"),
        ({"messages": [{"role": "system", "content": ""}]}, "no_answer"),
        ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "empty_turn"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "empty_turn"),
        ({"text": " \n", "prompt": "A", "response": " "}, "empty_turn"),
        ({"prompt": "A", "response": " "}, "empty_turn"),
        ({"prompt": "", "response": "B"}, "empty_turn"),
        ({"messages": [ASK, {"role": "narrator", "content": "A"}, ANSWER]}, "unknown_role"),
        ({"messages": [{"content": "A"}, ANSWER]}, "unknown_role"),
        ({"messages": [ASK, {"role": "tool", "content": "A"}, ANSWER]}, "tool_use"),
        ({"messages": [ASK, {"role": "Function", "content": "A"}, ANSWER]}, "tool_use"),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
                    ANSWER,
                ]
            },
            "tool_use",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
                    ANSWER,
                ]
            },
            "not_text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "A"}]}, ANSWER]},
            "not_text",
        ),
    ],
)
def test_rows_that_cannot_be_rendered_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        render_row(row)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Name one.", "input": "", "output": "The Oder."},
        {"messages": [ASK, ANSWER], "source": "the archive of the harbour and its lamps"},
        {"system": None, "answers": {"text": ["a b c d e f g"]}, "lang": "en", "role": ""},
    ],
)
def test_text_that_has_its_other_fields_is_used_as_it_is(row: dict[str, Any]) -> None:
    text = "Below is a task.\nName one. Name a river.\n### The Oder.\n"
    assert render_row({**row, "text": text}) == text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Name one.", "output": "Two."}, "unknown_field"),
        ({"prompt": "Name two."}, "unknown_field"),
        ({"question": "A?", "choices": ["x", "Name one."]}, "unknown_field"),
        ({"messages": [ASK, ANSWER]}, "unknown_field"),
        ({"code": LONG}, "unknown_field"),
        ({"role": "Prompter", "parent_id": None}, "single_turn"),
        ({"from": "gpt"}, "single_turn"),
    ],
)
def test_text_that_is_a_part_of_its_row_is_dropped(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        render_row({**row, "text": "Name one."})


def test_turns_under_the_text_key_are_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [{"dialog": [ASK, ANSWER], "id": "a", "group": "g"}])
    source = replace(make_source("instructions", tmp_path / "raw"), text_key="dialog")
    (row,), _ = run_recipe(source, tmp_path / "clean")
    assert row["text"] == "User: Name a river.\n\nAssistant: The Oder.\n"
    assert (row["id"], row["group"]) == ("a", "g")
