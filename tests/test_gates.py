"""`make test` covers every area, and the names in the lists of gates exist."""

import ast

import pytest

from tests.commands import ROOT, python
from tests.conftest import GATES

# one test of `make test` for each area
AREAS = {
    "parity with transformers": "tests/model/test_mamba.py::test_equals_transformers",
    "kernels": "tests/model/test_kernels.py::test_cpu_in_fp32",
    "tensor parallelism of 2": "tests/train/test_world.py::test_two_ranks_equal_one",
    "ZeRO 0, 2 and 3": "tests/train/test_world.py::test_another_layout_or_engine_resumes_from_a_"
    "checkpoint",
    "kill and resume": "tests/train/test_faults.py::test_short_soak_is_bit_identical_to_a_clean_"
    "run",
    "a fault": "tests/train/test_faults.py::test_incidents_name_the_rank_and_the_tokens",
    "prepare with a kill": "tests/data/test_prepare.py::test_killed_run_resumes_to_the_same_bytes",
    "export and load": "tests/eval/test_export.py::test_transformers_computes_our_logits_with_"
    "and_without_cache",
    "plan": "tests/launch/test_plan.py::test_the_command_writes_json",
    "README's own commands": "tests/test_readme.py::test_loss_decreases",
    "golden losses": "tests/test_golden.py::test_golden_losses_are_kept",
    "fixtures": "tests/test_fixtures.py::test_run_resumes_from_an_old_checkpoint",
}


def decorators(name: str) -> list[str]:
    """Decorators of a test, `file::function`; fails if there is no such test."""
    file, _, function = name.partition("::")
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [ast.unparse(decorator) for decorator in node.decorator_list]
    raise AssertionError(f"no test {name}")


@pytest.mark.parametrize("area", AREAS)
def test_make_test_covers_every_area(area: str) -> None:
    assert "pytest.mark.slow" not in decorators(AREAS[area])
    assert not AREAS[area].startswith(GATES)


@pytest.mark.parametrize("name", GATES)
def test_names_in_gates_exist(name: str) -> None:
    if "::" in name:
        decorators(name)
    else:
        assert (ROOT / name).exists(), name


def test_the_preloaded_module_imports() -> None:
    """The fork server ignores an ImportError: then every rank would import everything itself."""
    result = python("-c", "import tests.preload")
    assert result.returncode == 0, result.stderr
