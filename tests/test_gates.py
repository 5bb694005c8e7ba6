"""What gates a change: `make test` touches every room, and no name in a list is out of date."""

import ast

import pytest

from tests.commands import ROOT
from tests.conftest import GATES

# What `make test` shows of every room, by a test of it.
ROOMS = {
    "parity with transformers": "tests/model/test_mamba.py::test_equals_transformers",
    "kernels": "tests/model/test_kernels.py::test_cpu_in_fp32",
    "tensor parallelism of 2": "tests/train/test_world.py::test_two_ranks_equal_one",
    "ZeRO 0, 2 and 3": "tests/train/test_world.py::test_another_layout_or_engine_resumes_from_a_"
    "checkpoint",
    "kill and resume": "tests/train/test_faults.py::test_a_short_soak_ends_bit_for_bit_as_a_clean_"
    "run",
    "a fault": "tests/train/test_faults.py::test_incidents_name_the_rank_and_the_tokens",
    "prepare with a kill": "tests/data/test_prepare.py::test_killed_run_resumes_to_the_same_bytes",
    "export and load": "tests/eval/test_export.py::test_transformers_computes_our_logits_with_"
    "and_without_cache",
    "plan": "tests/launch/test_plan.py::test_the_command_writes_json",
    "README's own commands": "tests/test_readme.py::test_it_learns",
    "golden losses": "tests/test_golden.py::test_golden_losses_are_kept",
    "fixtures": "tests/test_fixtures.py::test_a_run_goes_on_from_an_old_checkpoint",
}


def marks(name: str) -> list[str]:
    """Decorators of a test that is there, as `file::function`."""
    file, _, function = name.partition("::")
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [ast.unparse(decorator) for decorator in node.decorator_list]
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("room", ROOMS)
def test_make_test_touches_every_room(room: str) -> None:
    assert "pytest.mark.slow" not in marks(ROOMS[room])
    assert not ROOMS[room].startswith(GATES)


@pytest.mark.parametrize("name", GATES)
def test_what_make_test_leaves_out_is_there(name: str) -> None:
    if "::" in name:
        marks(name)
    else:
        assert (ROOT / name).exists(), name
