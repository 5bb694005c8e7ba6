"""Every backend equals a naive recurrence in fp64: forward and all gradients, with and without
resets and states.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from model.config import SCAN_CHUNK, Backend, Recompute
from model.kernels import (
    CPU,
    CUDA,
    MAMBA_SSM,
    REFERENCE,
    MissingBackend,
    cpu,
    cpu_library,
    cuda,
    load,
    reference,
    skipped_kernels,
)
from model.kernels.interface import Kernels
from tests.gpu import DEVICES
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
    scan_results,
)
from tests.tiny import TINY, model_of

PATHS = ["avx512", "avx2", "portable"]
# this processor runs its own path and all narrower ones
PATHS = PATHS[PATHS.index(cpu.instruction_set()) :]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_in_fp64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    one_step = case.batch * case.channels * case.states
    # several chunks, the last one short
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * one_step)
    # and the longer cases compute them again
    monkeypatch.setattr(reference, "MAX_SAVED_ELEMENTS", 20 * one_step)
    assert_equal(REFERENCE, case, torch.float64, 1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_in_fp32(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "instruction_set", lambda: path)
    assert_equal(CPU, case, torch.float32, 1e-5)


@settings(max_examples=60, derandomize=True)
@given(CASE)
def test_cpu_on_random_shapes(case: Case) -> None:
    assert_equal(CPU, case, torch.float32, 2e-5)


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
def test_bf16_in_and_out(kernels: Kernels) -> None:
    """Arithmetic in fp32 on bf16 values: the error is that of rounding results and incoming
    gradients, 2^-9 each.
    """
    case = Case(2, 40, 32, 16, resets=0.1)
    assert_equal(kernels, case, torch.bfloat16, 4e-3)
    y, last = kernels.selective_scan(*case.inputs(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_rows_of_wider_tensors_are_read_in_place() -> None:
    """u and z are halves of in_proj's output, B and C parts of x_proj's."""
    case = Case(2, 20, 32, 16)
    u, dt, A, B, C, D, z, dt_bias = (x.detach() for x in case.inputs(torch.float32))
    xz, BC = torch.cat([u, z], -1), torch.cat([B, C], -1)
    halves, parts = xz.chunk(2, -1), BC.chunk(2, -1)
    expected, _ = CPU.selective_scan(u, dt, A, B, C, D, z, dt_bias)
    actual, _ = CPU.selective_scan(halves[0], dt, A, *parts, D, halves[1], dt_bias)
    assert torch.equal(actual, expected)
    assert cpu._with_token_stride(halves[0]).data_ptr() == xz.data_ptr()


def test_cpu_is_deterministic_for_any_number_of_threads() -> None:
    case = Case(3, 50, 300, 16, resets=0.1)
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(
                scan_results(CPU.selective_scan, case, torch.float32)
                + conv_results(CPU.causal_conv1d, case, torch.float32)
            )
    finally:
        torch.set_num_threads(1)
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("cuts", DOC_START_POSITIONS)
def test_resets_isolate_documents(cuts: list[int], kernels: Kernels) -> None:
    assert_documents_are_isolated(kernels, cuts)


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
def test_a_sequence_in_two_halves_is_the_whole(kernels: Kernels) -> None:
    assert_state_carries_over(kernels)


def test_defaults_of_the_process_change_nothing() -> None:
    """Memory for results is fp32 on the CPU whatever torch would give by default."""
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_equal(CPU, CASES[2], torch.float32, 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_tokens_are_refused(shape: tuple[int, int]) -> None:
    b, l = shape
    with pytest.raises(ValueError, match="no tokens"):
        CPU.causal_conv1d(torch.ones(b, l, 16), torch.ones(16, 4), torch.ones(16))
    inputs = [x.detach() for x in Case(1, 1, 16, 4).inputs(torch.float32)]
    for index in (0, 1, 3, 4, 6):
        inputs[index] = inputs[index].expand(1, 1, -1).new_zeros(b, l, inputs[index].shape[-1])
    with pytest.raises(ValueError, match="no tokens"):
        CPU.selective_scan(*inputs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_obey_torch(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake and autograd rules: shapes, strides, aliasing, and gradients under tracing."""
    monkeypatch.setattr(cpu, "instruction_set", lambda: path)
    inputs, state = case.inputs(torch.float32), case.state(torch.float32)
    ops = torch.ops.falcon_cpu
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        ops.selective_scan.default, (*inputs, case.doc_starts(), state, True), test_utils=checks
    )
    torch.library.opcheck(
        ops.causal_conv1d.default,
        (inputs[0], *case.weights(torch.float32), None),
        test_utils=checks,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_their_fakes_say(dtype: torch.dtype) -> None:
    """Also those that a backward calls, and in bf16."""
    case, ops, check = (
        Case(2, 9, 12, 4, resets=0.2),
        torch.ops.falcon_cpu,
        ("test_schema", "test_faketensor"),
    )
    inputs, (weight, bias) = (
        [x.detach() for x in t] for t in (case.inputs(dtype), case.weights(dtype))
    )
    y, last, kept = ops.selective_scan(*inputs, case.doc_starts(), None, True)
    out, scales = ops.rms_norm(inputs[0], bias, 1e-5, [12], torch.float32)
    logits, labels = inputs[0].flatten(0, 1), torch.arange(18) % 12
    sums = torch.ones(18)
    for operator, arguments in (
        (ops.selective_scan, (*inputs, case.doc_starts(), None, False)),
        (ops.selective_scan_backward, (*inputs, case.doc_starts(), None, kept, y, None)),
        (ops.selective_scan_backward, (*inputs, case.doc_starts(), last, kept, y, last)),
        (ops.causal_conv1d_backward, (inputs[0], weight, bias, case.doc_starts(), inputs[1])),
        (ops.rms_norm, (inputs[0], None, 1e-5, [4, 8], dtype)),
        (ops.rms_norm_backward, (inputs[0], bias, [12], scales, out)),
        (ops.rms_norm_backward, (inputs[0], None, [12], scales, out)),
        (ops.loss_statistics, (logits, labels)),
        (ops.loss_gradient, (logits.clone(), labels, sums, sums, sums)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=check)


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_states_saved_only_for_backward(CPU, cpu, monkeypatch)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", [0, 1, 2, 6])
def test_what_is_not_a_number_stays_so(
    which: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that diverges must show it: no input's NaN may vanish in the arithmetic."""
    monkeypatch.setattr(cpu, "instruction_set", lambda: path)
    inputs = [x.detach() for x in Case(1, 9, 16, 4).inputs(torch.float32)]
    inputs[which] = inputs[which].clone()
    inputs[which].view(-1)[0] = float("nan")
    assert CPU.selective_scan(*inputs)[0].isnan().any()
    assert (
        CPU.causal_conv1d(inputs[0], torch.full((16, 4), float("nan")), torch.ones(16))
        .isnan()
        .all()
    )


@pytest.mark.parametrize("shape", [(1, 4, 16), (4, 1, 16), (1, 1, 16)])
def test_strides_of_axes_of_length_one_say_nothing(shape: tuple[int, int, int]) -> None:
    wide = torch.randn(shape[1], shape[0], 64)
    x = wide[..., :16].transpose(0, 1)  # rows 64 apart, whatever stride the axis of length 1 shows
    weight, bias = torch.randn(16, 4), torch.randn(16)
    expected = REFERENCE.causal_conv1d(x, weight, bias)
    torch.testing.assert_close(CPU.causal_conv1d(x, weight, bias), expected, rtol=1e-5, atol=1e-6)


def test_too_many_states_are_refused() -> None:
    with pytest.raises(ValueError, match="d_state=33 exceeds"):
        CPU.selective_scan(*Case(1, 3, 16, 33).inputs(torch.float32))


def test_sizes_agree_with_the_source() -> None:
    lib = cpu.active_library()
    assert (
        lib.chunk_steps() == SCAN_CHUNK
        and lib.vector_width() == cpu_library.VECTOR_WIDTHS[cpu.instruction_set()]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_are_the_same_model(device: str) -> None:
    """By torch.compile's own code generator: losses and gradients, of one code for all blocks and
    shapes.
    """
    generator = torch.Generator().manual_seed(1)
    kernels, limits = (CPU, (1e-6, 1e-7)) if device == "cpu" else (CUDA, (1e-4, 1e-6))
    plain, compiled = (model_of(TINY, kernels=kernels, device=device) for _ in range(2))
    compiled.set_recompute(Recompute.full)
    compiled.compile_blocks()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for batch, length in ((2, 32), (3, 48), (2, 20), (3, 32)):
        tokens = torch.randint(0, TINY.vocab_size, (batch, length + 1), generator=generator).to(
            device
        )
        doc_starts = (torch.rand(batch, length, generator=generator) < 0.1).to(device)
        expected, losses = (
            model(tokens[:, :-1], tokens[:, 1:], doc_starts)[0].mean()
            for model in (plain, compiled)
        )
        torch.testing.assert_close(losses, expected, rtol=limits[0], atol=limits[1])
        (expected + losses).backward()
    for parameter, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=limits[0], atol=limits[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_model_compiles_traces_on_meta_and_recomputes() -> None:
    tokens = torch.randint(0, TINY.vocab_size, (2, 21))
    model = model_of(TINY, kernels=CPU)
    expected = model(tokens[:, :-1], tokens[:, 1:])[0]
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:])[0], expected)
    with torch.device("meta"):
        shape = (
            model_of(TINY, kernels=CPU, device="meta")
            .logits(torch.empty(2, 20, dtype=torch.int64))
            .shape
        )
    assert shape == (2, 20, TINY.vocab_size)


def test_backends_are_chosen_by_name_and_presence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(Backend.reference, "cpu") is REFERENCE and load(Backend.cpu, "cpu") is CPU
    assert load(Backend.auto, "cpu") is CPU
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load(Backend.auto, "cpu") is REFERENCE
    with pytest.raises(MissingBackend, match=r"apt-get install g\+\+"):
        load(Backend.cpu, "cpu")
    with pytest.raises(MissingBackend, match="set compute.kernels=auto"):
        load(Backend.cpu, "cuda")


def test_faster_backends_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cuda, "unavailable_reason", lambda: "no cuda-core: pip install 'cuda-core[cu13]'"
    )
    lines = skipped_kernels(REFERENCE, "cuda")
    assert lines[0] == "cuda: no cuda-core: pip install 'cuda-core[cu13]'"
    assert len(lines) == 2 and lines[1].startswith("mamba_ssm: no ")
    assert skipped_kernels(MAMBA_SSM, "cuda") == lines[:1] and skipped_kernels(CUDA, "cuda") == []
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    expected = "cuda: it is available: set compute.kernels=cuda"
    assert skipped_kernels(REFERENCE, "cuda")[0] == expected


def test_backward_cost_grows_linearly() -> None:
    """Tensors that the reference's backward allocates grow with length, not with its square."""
    sizes = []
    for length in (64, 128):
        inputs = replace(CASES[1], length=length).inputs()
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
            reference.selective_scan(*inputs)[0].sum().backward()
        sizes.append(sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()))
    assert sizes[1] < 2.5 * sizes[0], sizes


def test_rms_norm() -> None:
    x = torch.randn(3, 7)
    torch.testing.assert_close(reference.rms_norm(x, None, 1e-6), F.rms_norm(x, (7,), eps=1e-6))
    assert reference.rms_norm(x.bfloat16(), None, 1e-6).dtype == torch.bfloat16
    parts = reference.rms_norm(x, None, 1e-6, [4, 2, 1], torch.float64)
    assert parts.dtype == torch.float64
    expected = torch.cat(
        [F.rms_norm(part, part.shape[-1:], eps=1e-6) for part in x.split([4, 2, 1], -1)], -1
    )
    torch.testing.assert_close(parts.float(), expected)
