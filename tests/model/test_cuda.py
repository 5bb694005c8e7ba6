"""Our CUDA kernels: compiled for sm_90 and counted without a GPU, their logic run on an emulator, all on a GPU."""

import io
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from model.config import SCAN_CHUNK, Backend
from model.kernels import CUDA, MAMBA_SSM, REFERENCE, MissingBackend, cuda, cuda_library, cuda_rows, load, mamba_ssm
from model.kernels.interface import Kernels
from model.kernels.ops import register
from tests.cuda import emulated
from tests.model.cases import (
    CASE,
    CASES,
    CUTS,
    Case,
    assert_documents_are_isolated,
    assert_equal,
    assert_halves_are_the_whole,
    assert_kept_for_gradients_alone,
    elsewhere,
    scan_results,
)
from tests.model.public import public_kernels

GPU = torch.cuda.is_available()
# what the design needs of an SM's 65,536: three blocks of 256 threads in the scan's forward; in its backward two of
# 128, as its shared memory allows; four in its adjoint; of 128 seven in the convolution's backward, eight elsewhere
REGISTERS = {
    "scan_forward.cu": {"scan_forward": 85, "scan_summary": 85},
    "scan_backward.cu": {"scan_backward": 255, "scan_adjoint": 128},
    "conv.cu": {"conv_forward": 64, "conv_backward": 72},
    "rows.cu": {
        f"{name}{ending}": 64 for name in ("norm_forward", "norm_backward", "norm_weight") for ending in ("", "_narrow")
    }
    | {"loss_statistics": 64, "loss_gradient": 64},
}

UNSEEN = {"scan_summary", "scan_adjoint"} | {f"norm_{name}_narrow" for name in ("forward", "backward", "weight")}


@pytest.fixture(scope="module")
def emulation() -> Kernels:
    """The cuda backend with launches sent to the emulator."""
    kernels = register(cuda, "emulated", "cpu")
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda_library, "launch", emulated.launch)
    patch.setattr(cuda, "processors", lambda device: 132)
    yield kernels
    patch.undo()


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("source", ["scan_forward.cu", "scan_backward.cu", "conv.cu", "rows.cu"])
def test_compiles_for_hopper_without_spills(source: str, bf16: int) -> None:
    log = io.StringIO()
    cuda_library.compile_source(source, bf16, "sm_90", log)
    parts = re.findall(r"Compiling entry function '(\w+)'(.*?)Used (\d+) registers", log.getvalue(), flags=re.S)
    assert {name for name, _, _ in parts} == set(REGISTERS[source])
    for name, properties, registers in parts:
        assert "0 bytes spill stores, 0 bytes spill loads" in properties, (name, properties)
        assert int(registers) <= REGISTERS[source][name], (name, registers)


def test_host_and_kernels_agree_on_sizes() -> None:
    for source, name, value in (
        ("scan.cuh", "STATES", cuda.STATES), ("scan.cuh", "CHUNK", SCAN_CHUNK),
        ("scan_forward.cu", "CHANNELS", cuda.FORWARD_CHANNELS), ("scan_forward.cu", "THREADS", cuda.FORWARD_THREADS),
        ("scan_backward.cu", "CHANNELS", cuda.CHANNELS), ("scan_backward.cu", "THREADS", cuda.BACKWARD_THREADS),
        ("conv.cu", "TAPS", cuda.TAPS), ("conv.cu", "SEGMENT", cuda.CONV_SEGMENT),
        ("conv.cu", "THREADS", cuda.CONV_THREADS), ("rows.cu", "WARPS", cuda_rows.WARPS),
        ("rows.cu", "ROWS", cuda_rows.ROWS), ("rows.cu", "PARTS", cuda_rows.PARTS),
        ("rows.cu", "THREADS", cuda_rows.THREADS),
    ):  # fmt: skip
        text = (cuda_library.FOLDER / source).read_text()
        assert re.search(rf"#define {name} {value}\b", text), (source, name)
    program = [
        '#include "emulator.h"', "float4 shared_memory[1];", '#include "scan_backward.cu"',
        f'static_assert(sizeof(Backward) == {cuda.BACKWARD_SHARED}, "shared memory of the backward");',
    ]  # fmt: skip
    flags = ["-fsyntax-only", "-std=c++17", "-DBF16=1", f"-I{cuda_library.FOLDER}", f"-I{emulated.HERE}", "-xc++", "-"]
    subprocess.run(["g++", *flags], input="\n".join(program), text=True, check=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_in_fp32(case: Case, emulation: Kernels) -> None:
    assert_equal(emulation, case, torch.float32, 1e-5)


@pytest.mark.parametrize("resets", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("length", [70, 101])
def test_emulated_in_segments(length: int, resets: float, emulation: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, the last one short; states and adjoints cross them unless a document opens between."""
    monkeypatch.setattr(cuda, "LEAST_SEGMENT", 16)
    seen = []

    def launch(source: str, name: str, dtype: torch.dtype, grid: tuple[int, int, int], *rest) -> None:
        seen.append((name, grid[2]))
        emulated.launch(source, name, dtype, grid, *rest)

    monkeypatch.setattr(cuda_library, "launch", launch)
    for first in (False, True):
        case = Case(2, length, 20, 5 if first else 16, resets=resets, first=first, dt=-4.0)
        assert_equal(emulation, case, torch.float32, 1e-5)
    assert {"scan_summary", "scan_adjoint"} <= {name for name, _ in seen}
    assert all(parts >= 3 for name, parts in seen if name in ("scan_forward", "scan_backward"))


@pytest.mark.parametrize("case", [CASES[2], Case(2, 65, 66, 16, resets=0.1)], ids=str)
def test_emulated_in_bf16(case: Case, emulation: Kernels) -> None:
    assert_equal(emulation, case, torch.bfloat16, 8e-3)  # also the gradient that comes in is rounded, 2^-9


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CASE)
def test_emulated_on_random_shapes(emulation: Kernels, case: Case) -> None:
    assert_equal(emulation, case, torch.float32, 2e-5)


def test_the_driver_takes_our_arguments(emulation: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real argument lists go through cuda-core's own conversion, which refuses types that it does not know."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    seen = []

    def launch(*arguments) -> None:
        handler.ParamHolder(cuda_library.parameters(arguments[-1]))
        seen.append(arguments[1])
        emulated.launch(*arguments)

    monkeypatch.setattr(cuda_library, "launch", launch)
    assert_equal(emulation, CASES[2], torch.float32, 1e-5)
    assert set(seen) == {name for kernels in REGISTERS.values() for name in kernels} - UNSEEN


def test_launches_go_to_torchs_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object for each stream, whatever the order."""
    core, seen, handles = pytest.importorskip("cuda.core"), [], iter([7, 7, 9, 7])
    monkeypatch.setattr(core, "launch", lambda stream, *rest: seen.append(stream))
    monkeypatch.setattr(core, "Device", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=next(handles)))
    monkeypatch.setattr(cuda_library, "_kernel", lambda *arguments: None)
    for _ in range(4):
        cuda_library.launch("rows.cu", "norm_forward", torch.float32, (1, 1, 1), 32, 0, [torch.ones(1)])
    assert [int(stream.handle) for stream in seen] == [7, 7, 9, 7]
    assert seen[0] is seen[1] is seen[3]


def test_no_thread_depends_on_another_without_a_barrier(emulation: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads run to each barrier in rising and in falling order; a race would give two results."""
    case = Case(2, 70, 80, 16, resets=0.1, first=True)
    rising = scan_results(emulation.selective_scan, case, torch.float32)
    monkeypatch.setattr(emulated, "FALLING", True)
    falling = scan_results(emulation.selective_scan, case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(rising, falling, strict=True))


def test_models_that_do_not_fit_are_refused(emulation: Kernels) -> None:
    inputs = Case(1, 4, 8, 17).inputs(torch.float32)
    with pytest.raises(ValueError, match="d_state 17 exceeds"):
        emulation.selective_scan(*inputs)
    with pytest.raises(ValueError, match="d_conv 5 exceeds"):
        emulation.causal_conv1d(inputs[0], torch.ones(8, 5), torch.ones(8))


@pytest.mark.parametrize("cuts", CUTS)
def test_emulated_documents_are_isolated(cuts: list[int], emulation: Kernels) -> None:
    assert_documents_are_isolated(emulation, cuts)


def test_emulated_halves_are_the_whole(emulation: Kernels) -> None:
    assert_halves_are_the_whole(emulation)


def test_emulated_keeps_nothing_without_gradients(emulation: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kept_for_gradients_alone(emulation, cuda, monkeypatch)


def test_mixed_types_are_not_rounded(emulation: Kernels) -> None:
    """One narrow input makes no other narrow, and a norm that is to be wide is wide."""
    inputs = [x.detach() for x in CASES[1].inputs(torch.float32)]
    inputs[0] = inputs[0].bfloat16()
    expected, actual = (k.selective_scan(*inputs)[1] for k in (REFERENCE, emulation))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    expected, actual = (k.rms_norm(inputs[0], None, 1e-6, dtype=torch.float32) for k in (REFERENCE, emulation))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("cuts", CUTS)
def test_public_kernels_isolate_documents(cuts: list[int]) -> None:
    with public_kernels():
        assert_documents_are_isolated(MAMBA_SSM, cuts)
        assert_halves_are_the_whole(MAMBA_SSM)


def test_layers_of_a_step_share_their_places() -> None:
    starts = torch.tensor([[True, False, True, False]])
    places, length = mamba_ssm._places(starts)
    assert mamba_ssm._places(starts)[0] is places and (places.tolist(), length) == ([[1, 2, 4, 5]], 6)
    starts[0, 1] = True
    assert mamba_ssm._places(starts)[0].tolist() == [[1, 3, 5, 6]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_kernels_are_composed_correctly(case: Case) -> None:
    """With stand-ins for the two public functions: layouts, resets and first states by steps, and all gradients."""
    with public_kernels():
        # the composition hands A over in fp32, and all of it where a state comes in
        assert_equal(MAMBA_SSM, case, torch.float64, 1e-5 if case.first else 1e-6)
        assert_equal(MAMBA_SSM, case, torch.bfloat16, 8e-3)


@pytest.mark.skipif(GPU, reason="a GPU is here")
def test_a_missing_gpu_or_package_is_named() -> None:
    with pytest.raises(MissingBackend, match=r"no GPU|cuda-core"):
        load(Backend.cuda, "cuda")
    with pytest.raises(MissingBackend, match="MAMBA_KEEP_CUDA_BUILD=TRUE"):
        load(Backend.mamba_ssm, "cuda")
    assert load(Backend.auto, "cuda").name == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, Case(2, 2000, 256, 16, resets=0.01, first=True)], ids=str)
def test_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    assert_equal(elsewhere(CUDA, torch.device("cuda")), case, dtype, 1e-4 if dtype is torch.float32 else 8e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or mamba_ssm.missing() is not None, reason="no GPU with mamba-ssm and causal-conv1d")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_kernels_on_the_gpu(case: Case) -> None:
    assert_equal(elsewhere(MAMBA_SSM, torch.device("cuda")), case, torch.float32, 1e-3)


def test_sources_travel_with_the_package() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    shipped = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "model.kernels"
    ]
    present = {path.suffix for path in cuda_library.FOLDER.iterdir() if path.suffix not in (".py", "")} - {".pyc"}
    assert {f"*{suffix}" for suffix in present} == set(shipped)
    assert sys.modules["model.kernels.cuda"] is cuda
