"""Our CUDA kernels: compiled for sm_90 and counted without a GPU, their logic run on an emulator,
all on a GPU.
"""

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
from model.kernels import (
    CUDA,
    MAMBA_SSM,
    REFERENCE,
    MissingBackend,
    cuda,
    cuda_library,
    cuda_rows,
    load,
    mamba_ssm,
)
from model.kernels.interface import Kernels
from model.kernels.ops import register
from tests.gpu import DEVICES, GPU, ON_GPU
from tests.model.cases import (
    CASE,
    CASES,
    DOC_START_POSITIONS,
    Case,
    assert_documents_are_isolated,
    assert_equal,
    assert_state_carries_over,
    assert_states_saved_only_for_backward,
    conv_results,
    loss_results,
    norm_results,
    on_device,
    scan_results,
)
from tests.model.cuda import emulated
from tests.model.fake_mamba_ssm import fake_mamba_ssm

# what the design needs of an SM's 65,536: three blocks of 256 threads in the scan's forward; in its
# backward two of 128, as its shared memory allows; four in its adjoint; of 128 seven in the
# convolution's backward, eight elsewhere
REGISTERS = {
    "scan_forward.cu": {"scan_forward": 85, "scan_summary": 85},
    "scan_backward.cu": {"scan_backward": 255, "scan_adjoint": 128},
    "conv.cu": {"conv_forward": 64, "conv_backward": 72},
    "rows.cu": {
        f"{name}{ending}": 64
        for name in ("norm_forward", "norm_backward", "norm_weight")
        for ending in ("", "_narrow")
    }
    | {"loss_statistics": 64, "loss_gradient": 64},
}

UNSEEN = {"scan_summary", "scan_adjoint"} | {
    f"norm_{name}_narrow" for name in ("forward", "backward", "weight")
}


EMULATED = register(cuda, "emulated", "cpu")


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The cuda backend with launches sent to the emulator, for one test: the next may be for a
    GPU.
    """
    monkeypatch.setattr(cuda_library, "launch", emulated.launch)
    monkeypatch.setattr(cuda, "sm_count", lambda device: 132)
    return EMULATED


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=ON_GPU)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The cuda backend on the emulator, and on a GPU: the same list of tests."""
    on_gpu = request.param == "cuda"
    return on_device(CUDA, torch.device("cuda")) if on_gpu else request.getfixturevalue("emulation")


def limit(kernels: Kernels, tolerance: float) -> float:
    """On a GPU ex2.approx and other orders of sums may cost ten times what fp32 on the emulator
    does.
    """
    return tolerance if kernels.name == "emulated" else 10 * tolerance


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("source", ["scan_forward.cu", "scan_backward.cu", "conv.cu", "rows.cu"])
def test_compiles_for_hopper_without_spills(source: str, bf16: int) -> None:
    log = io.StringIO()
    cuda_library.compile_source(source, bf16, "sm_90", log)
    parts = re.findall(
        r"Compiling entry function '(\w+)'(.*?)Used (\d+) registers", log.getvalue(), flags=re.S
    )
    assert {name for name, _, _ in parts} == set(REGISTERS[source])
    for name, properties, registers in parts:
        assert "0 bytes spill stores, 0 bytes spill loads" in properties, (name, properties)
        assert int(registers) <= REGISTERS[source][name], (name, registers)


def test_host_and_kernels_agree_on_sizes() -> None:
    for source, name, value in (
        ("scan.cuh", "STATES", cuda.STATES),
        ("scan.cuh", "CHUNK", SCAN_CHUNK),
        ("scan_forward.cu", "CHANNELS", cuda.FORWARD_CHANNELS),
        ("scan_forward.cu", "THREADS", cuda.FORWARD_THREADS),
        ("scan_backward.cu", "CHANNELS", cuda.CHANNELS),
        ("scan_backward.cu", "THREADS", cuda.BACKWARD_THREADS),
        ("conv.cu", "TAPS", cuda.TAPS),
        ("conv.cu", "SEGMENT", cuda.CONV_SEGMENT),
        ("conv.cu", "THREADS", cuda.CONV_THREADS),
        ("rows.cu", "WARPS", cuda_rows.WARPS),
        ("rows.cu", "ROWS", cuda_rows.ROWS),
        ("rows.cu", "MAX_SPLITS", cuda_rows.MAX_SPLITS),
        ("rows.cu", "THREADS", cuda_rows.THREADS),
    ):
        text = (cuda_library.FOLDER / source).read_text()
        assert re.search(rf"#define {name} {value}\b", text), (source, name)
    program = [
        '#include "emulator.h"', "float4 shared_memory[1];", '#include "scan_backward.cu"',
        f'static_assert(sizeof(Backward) == {cuda.BACKWARD_SHARED}, "shared memory of the '
        'backward");',
    ]  # fmt: skip
    flags = [
        "-fsyntax-only",
        "-std=c++17",
        "-DBF16=1",
        f"-I{cuda_library.FOLDER}",
        f"-I{emulated.HERE}",
        "-xc++",
        "-",
    ]
    subprocess.run(["g++", *flags], input="\n".join(program), text=True, check=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_fp32(case: Case, kernels: Kernels) -> None:
    assert_equal(kernels, case, torch.float32, limit(kernels, 1e-5))


@pytest.mark.parametrize("resets", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("length", [70, 101])
def test_emulated_in_segments(
    length: int, resets: float, emulation: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several segments, the last one short; states and adjoints cross them unless a document opens
    between.
    """
    monkeypatch.setattr(cuda, "MIN_SEGMENT", 16)
    seen = []

    def launch(
        source: str, name: str, dtype: torch.dtype, grid: tuple[int, int, int], *rest
    ) -> None:
        seen.append((name, grid[2]))
        emulated.launch(source, name, dtype, grid, *rest)

    monkeypatch.setattr(cuda_library, "launch", launch)
    for first in (False, True):
        case = Case(2, length, 20, 5 if first else 16, resets=resets, first=first, dt=-4.0)
        assert_equal(emulation, case, torch.float32, 1e-5)
    assert {"scan_summary", "scan_adjoint"} <= {name for name, _ in seen}
    assert all(parts >= 3 for name, parts in seen if name in ("scan_forward", "scan_backward"))


@pytest.mark.parametrize("case", [*CASES, Case(2, 65, 66, 16, resets=0.1)], ids=str)
def test_in_bf16(case: Case, kernels: Kernels) -> None:
    # also the gradient that comes in is rounded, 2^-9
    assert_equal(kernels, case, torch.bfloat16, 8e-3)


@settings(
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(CASE)
def test_on_random_shapes(kernels: Kernels, case: Case) -> None:
    assert_equal(kernels, case, torch.float32, limit(kernels, 2e-5))


def test_the_driver_takes_our_arguments(
    emulation: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real argument lists go through cuda-core's own conversion, which refuses types that it
    does not know.
    """
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
    """One object of cuda-core's for each stream, whatever the order; with stand-ins for both
    libraries.
    """
    core, seen, handles = pytest.importorskip("cuda.core"), [], iter([7, 7, 9, 7])
    stream = mock.Mock(from_handle=lambda handle: mock.Mock(handle=handle))
    for name, stand_in in (
        ("Stream", stream),
        ("Device", mock.MagicMock()),
        ("LaunchConfig", mock.Mock()),
    ):
        monkeypatch.setattr(core, name, stand_in)
    monkeypatch.setattr(core, "launch", lambda stream, *rest: seen.append(stream))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=next(handles))
    )
    monkeypatch.setattr(cuda_library, "_kernel", lambda *arguments: None)
    cuda_library._stream.cache_clear()
    for _ in range(4):
        cuda_library.launch(
            "rows.cu", "norm_forward", torch.float32, (1, 1, 1), 32, 0, [torch.ones(1)]
        )
    cuda_library._stream.cache_clear()  # of stand-ins
    assert [stream.handle for stream in seen] == [7, 7, 9, 7]
    assert seen[0] is seen[1] is seen[3]


def test_no_thread_depends_on_another_without_a_barrier(
    emulation: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads run to each barrier in rising and in falling order; a race would give two results."""
    case = Case(2, 70, 80, 16, resets=0.1, first=True)
    rising = scan_results(emulation.selective_scan, case, torch.float32)
    monkeypatch.setattr(emulated, "FALLING", True)
    falling = scan_results(emulation.selective_scan, case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(rising, falling, strict=True))


def test_models_that_do_not_fit_are_refused(kernels: Kernels) -> None:
    inputs = Case(1, 4, 8, 17).inputs(torch.float32)
    with pytest.raises(ValueError, match="d_state=17 exceeds"):
        kernels.selective_scan(*inputs)
    with pytest.raises(ValueError, match="d_conv=5 exceeds"):
        kernels.causal_conv1d(inputs[0], torch.ones(8, 5), torch.ones(8))


@pytest.mark.parametrize("cuts", DOC_START_POSITIONS)
def test_documents_are_isolated(cuts: list[int], kernels: Kernels) -> None:
    assert_documents_are_isolated(kernels, cuts)


def test_halves_are_the_whole(kernels: Kernels) -> None:
    assert_state_carries_over(kernels)


def test_emulated_keeps_nothing_without_gradients(
    emulation: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_states_saved_only_for_backward(emulation, cuda, monkeypatch)


def test_mixed_types_are_not_rounded(kernels: Kernels) -> None:
    """One narrow input makes no other narrow, and a norm that is to be wide is wide."""
    inputs = [x.detach() for x in CASES[1].inputs(torch.float32)]
    inputs[0] = inputs[0].bfloat16()
    expected, actual = (k.selective_scan(*inputs)[1] for k in (REFERENCE, kernels))
    assert (actual - expected).norm() <= limit(kernels, 1e-5) * expected.norm()
    expected, actual = (
        k.rms_norm(inputs[0], None, 1e-6, dtype=torch.float32) for k in (REFERENCE, kernels)
    )
    assert (actual - expected).norm() <= limit(kernels, 1e-5) * expected.norm()


def everything(kernels: Kernels, dtype: torch.dtype, case: Case) -> list[torch.Tensor]:
    """All results and gradients of all operations."""
    return [
        *scan_results(kernels.selective_scan, case, dtype),
        *conv_results(kernels.causal_conv1d, case, dtype),
        *norm_results(kernels.rms_norm, case, dtype),
        *loss_results(kernels.loss, case, dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again(dtype: torch.dtype, kernels: Kernels) -> None:
    case = Case(2, 70, 66, 16, resets=0.1, first=True)
    first, second = everything(kernels, dtype, case), everything(kernels, dtype, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_on_the_gpu_in_segments(kernels: Kernels) -> None:
    """As long as the GPU's own cut makes several segments of it; the same bits again, also on
    another stream.
    """
    case = Case(2, 2000, 256, 16, resets=0.01, first=True)
    assert_equal(kernels, case, torch.float32, 1e-4)
    assert_equal(kernels, case, torch.bfloat16, 8e-3)
    expected = everything(kernels, torch.bfloat16, case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy = torch.randn(4096, 4096, device="cuda")
        # what is launched on the wrong stream would run before this and read what is not there
        for _ in range(20):
            busy = busy @ busy * 1e-2
        actual = everything(kernels, torch.bfloat16, case)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("cuts", DOC_START_POSITIONS)
def test_public_kernels_isolate_documents(cuts: list[int]) -> None:
    with fake_mamba_ssm():
        assert_documents_are_isolated(MAMBA_SSM, cuts)
        assert_state_carries_over(MAMBA_SSM)


def test_layers_of_a_step_share_their_places() -> None:
    doc_starts = torch.tensor([[True, False, True, False]])
    places, length = mamba_ssm._padded_positions(doc_starts)
    assert mamba_ssm._padded_positions(doc_starts)[0] is places and (places.tolist(), length) == (
        [[1, 2, 4, 5]],
        6,
    )
    doc_starts[0, 1] = True
    assert mamba_ssm._padded_positions(doc_starts)[0].tolist() == [[1, 3, 5, 6]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_kernels_are_composed_correctly(case: Case) -> None:
    """With stand-ins for the two public functions: layouts, resets and first states by steps, and
    all gradients.
    """
    with fake_mamba_ssm():
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


PUBLIC = [
    *ON_GPU,
    pytest.mark.skipif(
        mamba_ssm.unavailable_reason() is not None, reason="needs mamba-ssm and causal-conv1d"
    ),
]


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=PUBLIC)])
@pytest.mark.parametrize("case", [*CASES, Case(2, 2100, 64, 16, resets=0.01, first=True)], ids=str)
def test_public_kernels_on_the_gpu(case: Case, where: str) -> None:
    """The longest one is of more than one of their chunks of 2,048 steps."""
    there = on_device(MAMBA_SSM, torch.device(where))
    assert_equal(there, case, torch.float32, 1e-3)
    assert_equal(there, case, torch.bfloat16, 1.6e-2)  # they round y before the gate too


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=PUBLIC)])
@pytest.mark.parametrize("cuts", DOC_START_POSITIONS)
def test_public_kernels_isolate_documents_on_the_gpu(cuts: list[int], where: str) -> None:
    assert_documents_are_isolated(on_device(MAMBA_SSM, torch.device(where)), cuts, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_what_their_fakes_say(device: str, request: pytest.FixtureRequest) -> None:
    """Shapes, strides, types and aliasing, by torch's own check."""
    if device == "cpu":
        request.getfixturevalue("emulation")
    ops = torch.ops.falcon_cuda if device == "cuda" else torch.ops.falcon_emulated
    case, check = Case(2, 9, 12, 4, resets=0.2), ("test_schema", "test_faketensor")
    inputs = [x.detach().to(device) for x in case.inputs(torch.bfloat16)]
    weight, bias = (x.detach().to(device) for x in case.weights(torch.float32))
    doc_starts = case.doc_starts().to(device)
    y, last, kept = ops.selective_scan(*inputs, doc_starts, None, True)
    for operator, arguments in (
        (ops.selective_scan, (*inputs, doc_starts, last, True)),
        (ops.selective_scan, (*inputs, doc_starts, last, False)),
        (ops.selective_scan_backward, (*inputs, doc_starts, last, kept, y, last)),
        (ops.causal_conv1d, (inputs[0], weight, bias, doc_starts)),
        (ops.causal_conv1d_backward, (inputs[0], weight, bias, doc_starts, y)),
        (ops.rms_norm, (inputs[0], bias, 1e-5, [12], torch.float32)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=check)


def test_sources_travel_with_the_package() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    shipped = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["model.kernels"]
    present = {
        path.suffix for path in cuda_library.FOLDER.iterdir() if path.suffix not in (".py", "")
    } - {".pyc"}
    assert {f"*{suffix}" for suffix in present} == set(shipped)
    assert sys.modules["model.kernels.cuda"] is cuda
