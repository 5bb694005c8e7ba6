"""The CUDA kernels: compiled for sm_90, run on an emulator, and run on a GPU where there is one."""

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
    CASES,
    DOC_START_POSITIONS,
    RANDOM_CASES,
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

# maximum registers per thread: the design's blocks per SM share 65,536. Three blocks of 256 threads
# in the scan's forward; two of 128 in its backward, as its shared memory allows; four of 128 in its
# adjoint; seven of 128 in the convolution's backward; eight of 128 in the others
MAX_REGISTERS = {
    "scan_forward.cu": {"scan_forward": 85, "scan_summary": 85},
    "scan_backward.cu": {"scan_backward": 255, "scan_adjoint": 128},
    "conv.cu": {"conv_forward": 64, "conv_backward": 72},
    "rows.cu": {
        f"{name}{suffix}": 64
        for name in ("norm_forward", "norm_backward", "norm_weight")
        for suffix in ("", "_narrow")
    }
    | {"loss_statistics": 64, "loss_gradient": 64},
}

# kernels that the case of test_cuda_core_accepts_the_arguments does not launch
NOT_LAUNCHED = {"scan_summary", "scan_adjoint"} | {
    f"norm_{name}_narrow" for name in ("forward", "backward", "weight")
}


EMULATED = register(cuda, "emulated", "cpu")


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The cuda backend with its launches replaced by the emulator, for one test."""
    monkeypatch.setattr(cuda_library, "launch", emulated.launch)
    monkeypatch.setattr(cuda, "sm_count", lambda device: 132)
    return EMULATED


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=ON_GPU)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The cuda backend on the emulator, and on a GPU."""
    on_gpu = request.param == "cuda"
    return on_device(CUDA, torch.device("cuda")) if on_gpu else request.getfixturevalue("emulation")


def limit(kernels: Kernels, tolerance: float) -> float:
    """Ten times the tolerance on a GPU: ex2.approx and other orders of sums are less accurate."""
    return tolerance if kernels.name == "emulated" else 10 * tolerance


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("source", ["scan_forward.cu", "scan_backward.cu", "conv.cu", "rows.cu"])
def test_compiles_for_hopper_without_spills(source: str, bf16: int) -> None:
    log = io.StringIO()
    cuda_library.compile_source(source, bf16, "sm_90", log)
    entries = re.findall(
        r"Compiling entry function '(\w+)'(.*?)Used (\d+) registers", log.getvalue(), flags=re.S
    )
    assert {name for name, _, _ in entries} == set(MAX_REGISTERS[source])
    for name, properties, registers in entries:
        assert "0 bytes spill stores, 0 bytes spill loads" in properties, (name, properties)
        assert int(registers) <= MAX_REGISTERS[source][name], (name, registers)


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
        f"-I{emulated.FOLDER}",
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
    """Three or more segments, the last one short, with and without document starts between them."""
    monkeypatch.setattr(cuda, "MIN_SEGMENT", 16)
    launched = []

    def launch(
        source: str, name: str, dtype: torch.dtype, grid: tuple[int, int, int], *rest
    ) -> None:
        launched.append((name, grid[2]))
        emulated.launch(source, name, dtype, grid, *rest)

    monkeypatch.setattr(cuda_library, "launch", launch)
    for states, has_state in ((16, False), (5, True)):
        case = Case(2, length, 20, states, resets=resets, has_state=has_state, dt=-4.0)
        assert_equal(emulation, case, torch.float32, 1e-5)
    assert {"scan_summary", "scan_adjoint"} <= {name for name, _ in launched}
    for name, segments in launched:
        assert segments >= 3 or name not in ("scan_forward", "scan_backward")


@pytest.mark.parametrize("case", [*CASES, Case(2, 65, 66, 16, resets=0.1)], ids=str)
def test_in_bf16(case: Case, kernels: Kernels) -> None:
    # the incoming gradient is rounded too, by 2^-9
    assert_equal(kernels, case, torch.bfloat16, 8e-3)


@settings(
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(RANDOM_CASES)
def test_on_random_shapes(kernels: Kernels, case: Case) -> None:
    assert_equal(kernels, case, torch.float32, limit(kernels, 2e-5))


def test_cuda_core_accepts_the_arguments(
    emulation: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuda-core converts the real argument lists; it rejects types that it does not know."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    launched = []

    def launch(*arguments) -> None:
        handler.ParamHolder(cuda_library.parameters(arguments[-1]))
        launched.append(arguments[1])
        emulated.launch(*arguments)

    monkeypatch.setattr(cuda_library, "launch", launch)
    assert_equal(emulation, CASES[2], torch.float32, 1e-5)
    names = {name for kernels in MAX_REGISTERS.values() for name in kernels}
    assert set(launched) == names - NOT_LAUNCHED


def test_launches_go_to_torchs_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-core gets one Stream object per stream handle; both libraries are mocked."""
    core = pytest.importorskip("cuda.core")
    handles = iter([7, 7, 9, 7])
    streams = []
    stream = mock.Mock(from_handle=lambda handle: mock.Mock(handle=handle))
    monkeypatch.setattr(core, "Stream", stream)
    monkeypatch.setattr(core, "Device", mock.MagicMock())
    monkeypatch.setattr(core, "LaunchConfig", mock.Mock())
    monkeypatch.setattr(core, "launch", lambda stream, *rest: streams.append(stream))
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
    cuda_library._stream.cache_clear()  # drop the mocks
    assert [stream.handle for stream in streams] == [7, 7, 9, 7]
    assert streams[0] is streams[1] is streams[3]


def test_no_races_between_barriers(emulation: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads run to each barrier in rising and in falling order; a race would change results."""
    case = Case(2, 70, 80, 16, resets=0.1, has_state=True)
    rising = scan_results(emulation.selective_scan, case, torch.float32)
    monkeypatch.setattr(emulated, "FALLING", True)
    falling = scan_results(emulation.selective_scan, case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(rising, falling, strict=True))


def test_too_many_states_or_taps_are_rejected(kernels: Kernels) -> None:
    inputs = Case(1, 4, 8, 17).inputs(torch.float32)
    with pytest.raises(ValueError, match="d_state=17 exceeds"):
        kernels.selective_scan(*inputs)
    with pytest.raises(ValueError, match="d_conv=5 exceeds"):
        kernels.causal_conv1d(inputs[0], torch.ones(8, 5), torch.ones(8))


@pytest.mark.parametrize("starts", DOC_START_POSITIONS)
def test_documents_are_isolated(starts: list[int], kernels: Kernels) -> None:
    assert_documents_are_isolated(kernels, starts)


def test_state_carries_over(kernels: Kernels) -> None:
    assert_state_carries_over(kernels)


def test_chunk_states_are_saved_only_for_backward(
    emulation: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_states_saved_only_for_backward(emulation, cuda, monkeypatch)


def test_mixed_dtypes_are_not_rounded(kernels: Kernels) -> None:
    """One bf16 input does not round the fp32 ones, and a norm with fp32 output is not rounded."""
    inputs = [x.detach() for x in CASES[1].inputs(torch.float32)]
    inputs[0] = inputs[0].bfloat16()
    expected, actual = (k.selective_scan(*inputs)[1] for k in (REFERENCE, kernels))
    assert (actual - expected).norm() <= limit(kernels, 1e-5) * expected.norm()
    expected, actual = (
        k.rms_norm(inputs[0], None, 1e-6, dtype=torch.float32) for k in (REFERENCE, kernels)
    )
    assert (actual - expected).norm() <= limit(kernels, 1e-5) * expected.norm()


def all_results(kernels: Kernels, dtype: torch.dtype, case: Case) -> list[torch.Tensor]:
    """All results and gradients of all operations."""
    return [
        *scan_results(kernels.selective_scan, case, dtype),
        *conv_results(kernels.causal_conv1d, case, dtype),
        *norm_results(kernels.rms_norm, case, dtype),
        *loss_results(kernels.loss, case, dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_deterministic(dtype: torch.dtype, kernels: Kernels) -> None:
    case = Case(2, 70, 66, 16, resets=0.1, has_state=True)
    first, second = all_results(kernels, dtype, case), all_results(kernels, dtype, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_segments_on_gpu(kernels: Kernels) -> None:
    """A sequence long enough for several segments; deterministic, also on another stream."""
    case = Case(2, 2000, 256, 16, resets=0.01, has_state=True)
    assert_equal(kernels, case, torch.float32, 1e-4)
    assert_equal(kernels, case, torch.bfloat16, 8e-3)
    expected = all_results(kernels, torch.bfloat16, case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy = torch.randn(4096, 4096, device="cuda")
        # a kernel on the wrong stream would run before this and read unwritten inputs
        for _ in range(20):
            busy = busy @ busy * 1e-2
        actual = all_results(kernels, torch.bfloat16, case)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("starts", DOC_START_POSITIONS)
def test_mamba_ssm_isolates_documents(starts: list[int]) -> None:
    with fake_mamba_ssm():
        assert_documents_are_isolated(MAMBA_SSM, starts)
        assert_state_carries_over(MAMBA_SSM)


def test_padded_positions_are_cached() -> None:
    doc_starts = torch.tensor([[True, False, True, False]])
    positions, length = mamba_ssm._padded_positions(doc_starts)
    assert positions.tolist() == [[1, 2, 4, 5]]
    assert length == 6
    assert mamba_ssm._padded_positions(doc_starts)[0] is positions
    doc_starts[0, 1] = True
    assert mamba_ssm._padded_positions(doc_starts)[0].tolist() == [[1, 3, 5, 6]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mamba_ssm_on_fakes(case: Case) -> None:
    """Layouts, resets, initial states and all gradients, with fakes of the public functions."""
    with fake_mamba_ssm():
        # the backend passes A in fp32, and all inputs if there is an initial state
        assert_equal(MAMBA_SSM, case, torch.float64, 1e-5 if case.has_state else 1e-6)
        assert_equal(MAMBA_SSM, case, torch.bfloat16, 8e-3)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_missing_gpu_or_package_is_named() -> None:
    with pytest.raises(MissingBackend, match=r"no GPU|cuda-core"):
        load(Backend.cuda, "cuda")
    with pytest.raises(MissingBackend, match="MAMBA_KEEP_CUDA_BUILD=TRUE"):
        load(Backend.mamba_ssm, "cuda")
    assert load(Backend.auto, "cuda").name == "reference"


NEEDS_MAMBA_SSM = [
    *ON_GPU,
    pytest.mark.skipif(
        mamba_ssm.unavailable_reason() is not None, reason="needs mamba-ssm and causal-conv1d"
    ),
]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_MAMBA_SSM)])
@pytest.mark.parametrize(
    "case", [*CASES, Case(2, 2100, 64, 16, resets=0.01, has_state=True)], ids=str
)
def test_mamba_ssm_on_gpu(case: Case, device: str) -> None:
    """The longest case has more than one of mamba-ssm's chunks of 2,048 steps."""
    kernels = on_device(MAMBA_SSM, torch.device(device))
    assert_equal(kernels, case, torch.float32, 1e-3)
    assert_equal(kernels, case, torch.bfloat16, 1.6e-2)  # mamba-ssm also rounds y before the gate


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_MAMBA_SSM)])
@pytest.mark.parametrize("starts", DOC_START_POSITIONS)
def test_mamba_ssm_isolates_documents_on_gpu(starts: list[int], device: str) -> None:
    assert_documents_are_isolated(on_device(MAMBA_SSM, torch.device(device)), starts, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_fake_results_equal_real_ones(device: str, request: pytest.FixtureRequest) -> None:
    """Shapes, strides, types and aliasing of the operators, by opcheck."""
    if device == "cpu":
        request.getfixturevalue("emulation")
    ops = torch.ops.falcon_cuda if device == "cuda" else torch.ops.falcon_emulated
    checks = ("test_schema", "test_faketensor")
    case = Case(2, 9, 12, 4, resets=0.2)
    inputs = [x.detach().to(device) for x in case.inputs(torch.bfloat16)]
    weight, bias = (x.detach().to(device) for x in case.weights(torch.float32))
    doc_starts = case.doc_starts().to(device)
    y, last_state, chunk_states = ops.selective_scan(*inputs, doc_starts, None, True)
    for operator, arguments in (
        (ops.selective_scan, (*inputs, doc_starts, last_state, True)),
        (ops.selective_scan, (*inputs, doc_starts, last_state, False)),
        (
            ops.selective_scan_backward,
            (*inputs, doc_starts, last_state, chunk_states, y, last_state),
        ),
        (ops.causal_conv1d, (inputs[0], weight, bias, doc_starts)),
        (ops.causal_conv1d_backward, (inputs[0], weight, bias, doc_starts, y)),
        (ops.rms_norm, (inputs[0], bias, 1e-5, [12], torch.float32)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_sources_are_in_the_package_data() -> None:
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
