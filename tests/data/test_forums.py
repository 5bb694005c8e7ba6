"""Forums: every message once, after its parent, whatever the ids and times look like."""

import itertools
import random
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from data.recipes.forums import REPLY_KEYS, linearize, seconds
from tests.data.samples import make_source, run_recipe, write_rows

LONG = "about the river and the fields that lie on both of its sides in spring, and the mill"
Rows = list[dict[str, Any]]


def order(messages: Rows, field: str = "text") -> list[Any]:
    """The order of messages, the same for every order of the input."""
    orders = {
        tuple(message[field] for message in linearize(shuffled))
        for shuffled in itertools.permutations(messages)
    }
    assert len(orders) == 1, orders
    return list(orders.pop())


def read(tmp_path: Path, rows: Rows) -> tuple[list[list[str]], dict[str, int]]:
    """First words of the messages of every conversation, and what the reader dropped."""
    write_rows(tmp_path / "raw" / "a.jsonl", list(rows))
    kept, steps = run_recipe(make_source("forums", tmp_path / "raw"), tmp_path / "clean")
    texts = [[part.split(" about")[0] for part in row["text"].split("\n\n")] for row in kept]
    return texts, steps[0].dropped


def test_conversations_are_rendered_once_and_in_order(tmp_path: Path) -> None:
    long = "about the river and the fields that lie on both of its sides in spring"
    tree = [
        {"id": "q", "title": "Rivers", "text": f"Question {long}", "created": 1, "author": "ann"},
        {"id": "b", "parent": "q", "text": f"Second {long}", "created": 9},
        {"id": "a", "parent": "q", "text": f"First {long}", "created": 3},
        {"id": "c", "parent": "a", "text": f"Reply {long}", "created": 20},
        {"id": "d", "parent": "b", "text": "[deleted]", "created": 21},
    ]
    flat = [{**message, "thread": "t1"} for message in tree]
    other = {"thread": "t2", "id": "z", "body": f"Alone {long} {long}", "created_utc": 4}
    write_rows(
        tmp_path / "raw" / "a.jsonl",
        [
            {"id": "n", "messages": tree},
            *flat,
            other,
            {"thread": "t1", "id": "late", "text": "x"},
            {"no": 1},
        ],
    )
    rows, steps = run_recipe(make_source("forums", tmp_path / "raw"), tmp_path / "clean")
    messages = [[text.split(" about")[0] for text in row["text"].split("\n\n")] for row in rows]
    assert messages == [["Rivers", "ann: Question", "First", "Reply", "Second"]] * 2 + [["Alone"]]
    assert [row["id"] for row in rows] == ["n", "t1", "t2"]
    assert steps[0].dropped == {"scattered": 1, "corrupt": 1} and steps[0].total == 5
    order = [message["id"] for message in linearize(reversed(tree))]
    assert order == ["q", "a", "c", "b", "d"]
    cycle = [{"id": "x", "parent": "y"}, {"id": "y", "parent": "x"}, {"id": "r", "parent": "lost"}]
    assert sorted(message["id"] for message in linearize(cycle)) == ["r", "x", "y"]


@pytest.mark.parametrize(
    ("submission", "comment", "reply"),
    [
        (  # with prefixes
            {"id": "t3_a", "link_id": "t3_a", "title": "T", "selftext": f"Sub {LONG}"},
            {"id": "t1_a", "link_id": "t3_a", "parent_id": "t3_a", "body": f"Com {LONG}"},
            {"id": "t1_b", "link_id": "t3_a", "parent_id": "t1_a", "body": f"Rep {LONG}"},
        ),
        (  # Reddit's dumps: no prefix in id, no link_id in submissions
            {"id": "a", "title": "T", "selftext": f"Sub {LONG}"},
            {"id": "a", "link_id": "t3_a", "parent_id": "t3_a", "body": f"Com {LONG}"},
            {"id": "b", "link_id": "t3_a", "parent_id": "t1_a", "body": f"Rep {LONG}"},
        ),
        (  # Reddit's API: both
            {"id": "a", "name": "t3_a", "title": "T", "selftext": f"Sub {LONG}"},
            {
                "id": "a",
                "name": "t1_a",
                "link_id": "t3_a",
                "parent_id": "t3_a",
                "body": f"Com {LONG}",
            },
            {"id": "b", "name": "t1_b", "link_id": "a", "parent_id": "t1_a", "body": f"Rep {LONG}"},
        ),
        (  # a thread named in the input, and prefixes in parents only
            {"id": "a", "thread": "t", "title": "T", "text": f"Sub {LONG}"},
            {"id": "a", "thread": "t", "parent": "t3_a", "text": f"Com {LONG}"},
            {"id": "b", "thread": "t", "parent": "t1_a", "text": f"Rep {LONG}"},
        ),
    ],
)
def test_a_comment_with_its_threads_number_is_a_message(
    tmp_path: Path, submission: Any, comment: Any, reply: Any
) -> None:
    texts, dropped = read(tmp_path, [submission, comment, reply])
    assert texts == [["T", "Sub", "Com", "Rep"]] and not dropped
    nested = [{"id": "n", "messages": [reply, comment, submission]}]
    assert read(tmp_path / "nested", nested)[0] == [["T", "Sub", "Com", "Rep"]]


def test_a_comment_whose_submission_is_missing_is_a_root() -> None:
    rows: Rows = [
        {"id": "a", "link_id": "t3_a", "parent_id": "t3_a", "body": "1", "created_utc": 5},
        {"id": "b", "link_id": "t3_a", "parent_id": "t3_a", "body": "0", "created_utc": 4},
    ]
    assert order(rows, "body") == ["0", "1"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": 0, "text": "0"}, {"id": 1, "parent": 0, "text": "1"}],
        [{"id": 0.0, "text": "0"}, {"id": 7.0, "parent": float("nan"), "text": "1"}],
        [{"id": 7.0, "text": "0"}, {"id": 9, "parent": 7.0, "text": "1"}],
        [{"id": "7", "text": "0"}, {"id": 9, "parent": 7, "text": "1"}],
        [{"id": 9, "text": "0"}, {"id": 10, "text": "1"}, {"id": 100, "text": "2"}],
        [{"id": "2", "text": "0", "time": 3}, {"id": "1", "parent": "2", "text": "1", "time": 1}],
        [{"id": "t3_x", "text": "0"}, {"id": "y", "parent": "x", "text": "1"}],
        [{"id": "x", "text": "0"}, {"id": "y", "parent": "t1_x", "text": "1"}],
    ],
)
def test_ids_of_every_form_are_found(rows: Rows) -> None:
    assert order(rows) == [str(i) for i in range(len(rows))]


def test_hacker_news_and_stackexchange_are_read(tmp_path: Path) -> None:
    news: Rows = [
        {"thread": 8, "id": 8, "type": "story", "by": "ann", "time": 1, "title": "Mills"},
        {"thread": 8, "id": 9, "parent": 8, "by": "bo", "time": 2, "text": f"First {LONG}"},
        {"thread": 8, "id": 11, "parent": 9, "by": "cy", "time": 9, "text": f"Reply {LONG}"},
        {"thread": 8, "id": 10, "parent": 8, "by": "di", "time": 3, "text": f"Second {LONG}"},
    ]
    posts: Rows = [
        {"Id": 4, "PostTypeId": 1, "Title": "Dams", "Body": f"Why {LONG}"},
        {"Id": 7, "PostTypeId": 2, "ParentId": 4, "Body": f"So {LONG}", "OwnerDisplayName": "ed"},
        {"Id": 5, "PostTypeId": "2", "ParentId": 4.0, "Body": f"Or {LONG}"},
        {"Id": 6, "PostTypeId": 5, "Body": f"A tag {LONG}"},
    ]
    texts, dropped = read(tmp_path, [*news, *posts])
    assert texts == [
        ["Mills", "bo: First", "cy: Reply", "di: Second"],
        ["Dams", "Why", "Or", "ed: So"],
    ]
    assert dropped == {"corrupt": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"thread": "t", "text": LONG},
        {"id": "a", "text": LONG},
        {"id": None, "thread": "t", "text": LONG},
        {"id": float("nan"), "thread": "t", "text": LONG},
        {"id": True, "thread": "t", "text": LONG},
        {"id": ["a"], "thread": "t", "text": LONG},
        {"id": "a", "thread": {"b": 1}, "text": LONG},
        {"id": "n", "messages": [{"text": LONG}]},
        {"id": "n", "messages": ["a"]},
        {"id": "n", "messages": [{"id": "a", "text": LONG}, {"id": "b", "text": [LONG]}]},
        {"id": "n", "text": [LONG], "messages": [{"id": "a", "text": LONG}]},
        {"id": "a", "thread": "t", "text": {"raw": LONG}},
    ],
)
def test_rows_without_an_id_or_a_thread_are_corrupt(tmp_path: Path, row: Any) -> None:
    assert read(tmp_path, [row]) == ([], {"corrupt": 1})


@pytest.mark.parametrize(
    ("row", "answers", "expected"),
    [
        ({"title": "T", "selftext": f"A {LONG}", "author": "ann"}, ["B"], ["T", "ann: A", "B"]),
        ({"text": f"A {LONG}"}, ["B", "C"], ["A", "B", "C"]),
        ({"title": "T", "text": f"B {LONG}"}, ["B", "C"], ["T", "B", "C"]),  # repeated
        ({"title": "T"}, ["B", "C"], ["T", "B", "C"]),
        ({"text": f"A {LONG} {LONG}"}, [], ["A"]),
    ],
)
def test_a_conversations_own_text_comes_first(
    tmp_path: Path, row: Any, answers: list[str], expected: list[str]
) -> None:
    messages = [
        {"id": i, "parent": 7, "text": f"{answer} {LONG}", "time": 5 + i}
        for i, answer in enumerate(answers)
    ]
    assert read(tmp_path, [{"id": 7, **row, "messages": messages}]) == ([expected], {})


@pytest.mark.parametrize("key", REPLY_KEYS)
def test_replies_that_are_not_read_are_counted(tmp_path: Path, key: str) -> None:
    reply = {"id": "b", "text": LONG}
    message = {"id": "a", "thread": "t", "text": f"A {LONG} {LONG}"}
    rows = [
        {**message, key: [reply]},
        {**message, key: {"kind": "Listing", "data": {"children": [reply]}}},
        {"id": "n", "messages": [{**message, key: [reply]}]},
        {**message, key: ""},  # Reddit's form of none
        {**message, key: [8, 9], "id": "c"},
    ]
    assert read(tmp_path, rows) == ([["A", "A"]], {"nested_replies": 3})


def test_rows_of_hacker_news_search_are_read(tmp_path: Path) -> None:
    rows: Rows = [
        {"objectID": "7", "story_text": f"A {LONG}", "title": "T", "created_at_i": 5},
        {"objectID": "9", "story_id": 7, "parent_id": 7, "comment_text": f"C {LONG}"}
        | {"created_at": "2020-01-02T00:00:00.000Z", "created_at_i": 1577923200},
        {"objectID": "10", "story_id": 7, "parent_id": 7, "comment_text": f"B {LONG}"}
        | {"created_at": "2020-01-01T00:00:00.000Z", "author": "ann"},
    ]
    assert read(tmp_path, rows) == ([["T", "A", "ann: B", "C"]], {})


def test_messages_with_one_id_and_other_texts_are_all_kept() -> None:
    rows: Rows = [
        {"id": "a", "text": "0", "time": 1},
        {"id": "a", "text": "0", "time": 1, "score": 3},
        {"id": "a", "text": "3", "time": 9},
        {"id": "b", "parent": "a", "text": "1", "time": 5},
        {"id": "b", "parent": "a", "text": "2", "time": 6},
    ]
    assert [message["text"] for message in linearize(rows)] == ["0", "1", "2", "3"]


MOMENT = datetime(2009, 2, 13, 23, 31, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "time",
    [
        1234567890,
        1234567890.0,
        "1234567890",
        " 1234567890.0 ",
        1234567890000,
        "1234567890000",
        1234567890000000,
        1234567890000000000,
        "2009-02-13T23:31:30Z",
        "2009-02-13T23:31:30.000",
        "2009-02-14T00:31:30+01:00",
        "2009-02-13 18:31:30-0500",
        "2009-02-13 23:31:30 UTC",
        "Fri, 13 Feb 2009 23:31:30 GMT",
        "Fri, 13 Feb 2009 18:31:30 -0500",
        MOMENT,
        MOMENT.replace(tzinfo=None),
        MOMENT.astimezone(timezone(timedelta(hours=5))),
    ],
)
def test_times_of_every_form_are_one_moment(time: Any) -> None:
    assert seconds(time) == 1234567890


@pytest.mark.parametrize(
    "time",
    [
        *(None, "", "yesterday", "nan", float("nan"), float("inf"), "-inf", -1, "-5", True, False),
        *(10**400, "1" * 400, [1], {"$date": 1}, "2009-02-31", "Fri, 99 Feb 2009", "\ud800"),
        *(datetime.min, datetime.min.replace(tzinfo=UTC), date.min, b"1"),
    ],
)
def test_nonsense_is_no_time(time: Any) -> None:
    assert seconds(time) is None


def test_messages_are_in_one_order_of_true_time() -> None:
    times = ["2009-02-13T23:31:31Z", 1234567892, "1234567893000", MOMENT + timedelta(seconds=4)]
    rows: Rows = [{"id": f"m{i}", "time": time, "text": i} for i, time in enumerate(times)]
    rows += [{"id": "n", "time": "yesterday", "text": 4}, {"id": "o", "time": -1, "text": 5}]
    assert order(rows) == [0, 1, 2, 3, 4, 5]


def test_any_fields_give_every_message_once() -> None:
    """Whatever is in a row, no message is lost and no order depends on the types."""
    choice = random.Random(0).choice
    ids = ["t1_a", "t3_a", "a", 1, "1", 1.0, 0, "b", "t1_b", "t4_c"]
    times = [None, 1, "2", "2009-02-13", "x", float("nan"), True, 10**30, MOMENT, -4, "", []]
    for _ in range(500):
        rows: Rows = [
            {"id": choice(ids), "parent_id": choice([*ids, None]), "created": choice(times), "n": n}
            | choice([{}, {"link_id": "t3_a"}, {"title": "T"}, {"selftext": "S"}])
            | {"text": f"text {n}"}
            for n in range(8)
        ]
        assert sorted(message["n"] for message in linearize(rows)) == list(range(8))
