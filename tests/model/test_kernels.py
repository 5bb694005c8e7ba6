"""The CPU backend and the reference equal a naive recurrence in fp64, forward and all gradients."""

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
    CASES,
    DOC_START_POSITIONS,
    RANDOM_CASES,
    Case,
    assert_documents_are_isolated,
    assert_equal,
    assert_state_carries_over,
    assert_states_saved_only_for_backward,
    conv_results,
    scan_results,
)
from tests.tiny import TINY, model_of

INSTRUCTION_SETS = ["avx512", "avx2", "portable"]
# this processor runs its widest set and all narrower ones
INSTRUCTION_SETS = INSTRUCTION_SETS[INSTRUCTION_SETS.index(cpu.instruction_set()) :]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_in_fp64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    step_elements = case.batch * case.channels * case.states
    # several chunks, the last one short
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * step_elements)
    # the longer cases recompute them
    monkeypatch.setattr(reference, "MAX_SAVED_ELEMENTS", 20 * step_elements)
    assert_equal(REFERENCE, case, torch.float64, 1e-11)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_in_fp32(case: Case, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "instruction_set", lambda: instructions)
    assert_equal(CPU, case, torch.float32, 1e-5)


@settings(max_examples=60, derandomize=True)
@given(RANDOM_CASES)
def test_cpu_on_random_shapes(case: Case) -> None:
    assert_equal(CPU, case, torch.float32, 2e-5)


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
def test_bf16_in_and_out(kernels: Kernels) -> None:
    """bf16 inputs compute in fp32: only results and incoming gradients round, by 2^-9 each."""
    case = Case(2, 40, 32, 16, resets=0.1)
    assert_equal(kernels, case, torch.bfloat16, 4e-3)
    y, last_state = kernels.selective_scan(*case.inputs(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and last_state.dtype == torch.float32


def test_slices_of_wider_tensors_are_not_copied() -> None:
    """u and z are slices of in_proj's output, B and C of x_proj's."""
    case = Case(2, 20, 32, 16)
    u, dt, A, B, C, D, z, dt_bias = (x.detach() for x in case.inputs(torch.float32))
    xz, BC = torch.cat([u, z], -1), torch.cat([B, C], -1)
    expected, _ = CPU.selective_scan(u, dt, A, B, C, D, z, dt_bias)
    u, z = xz.chunk(2, -1)
    B, C = BC.chunk(2, -1)
    actual, _ = CPU.selective_scan(u, dt, A, B, C, D, z, dt_bias)
    assert torch.equal(actual, expected)
    assert cpu._with_token_stride(u).data_ptr() == xz.data_ptr()


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
        torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True)
    )


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("starts", DOC_START_POSITIONS)
def test_resets_isolate_documents(starts: list[int], kernels: Kernels) -> None:
    assert_documents_are_isolated(kernels, starts)


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
def test_state_carries_over_between_chunks(kernels: Kernels) -> None:
    assert_state_carries_over(kernels)


def test_cpu_results_ignore_the_default_dtype() -> None:
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_equal(CPU, CASES[2], torch.float32, 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches_are_rejected(shape: tuple[int, int]) -> None:
    b, l = shape
    with pytest.raises(ValueError, match="no tokens"):
        CPU.causal_conv1d(torch.ones(b, l, 16), torch.ones(16, 4), torch.ones(16))
    inputs = [x.detach() for x in Case(1, 1, 16, 4).inputs(torch.float32)]
    for index in (0, 1, 3, 4, 6):
        inputs[index] = inputs[index].expand(1, 1, -1).new_zeros(b, l, inputs[index].shape[-1])
    with pytest.raises(ValueError, match="no tokens"):
        CPU.selective_scan(*inputs)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_pass_opcheck(
    case: Case, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemas, fake results and autograd registration of the operators in the forward."""
    monkeypatch.setattr(cpu, "instruction_set", lambda: instructions)
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
def test_fake_results_equal_real_ones(dtype: torch.dtype) -> None:
    """Shapes, strides and types of all operators, also those of the backward, by opcheck."""
    ops = torch.ops.falcon_cpu
    case = Case(2, 9, 12, 4, resets=0.2)
    checks = ("test_schema", "test_faketensor")
    inputs = [x.detach() for x in case.inputs(dtype)]
    weight, bias = (x.detach() for x in case.weights(dtype))
    y, last_state, chunk_states = ops.selective_scan(*inputs, case.doc_starts(), None, True)
    out, scales = ops.rms_norm(inputs[0], bias, 1e-5, [12], torch.float32)
    logits, labels = inputs[0].flatten(0, 1), torch.arange(18) % 12
    sums = torch.ones(18)
    for operator, arguments in (
        (ops.selective_scan, (*inputs, case.doc_starts(), None, False)),
        (ops.selective_scan_backward, (*inputs, case.doc_starts(), None, chunk_states, y, None)),
        (
            ops.selective_scan_backward,
            (*inputs, case.doc_starts(), last_state, chunk_states, y, last_state),
        ),
        (ops.causal_conv1d_backward, (inputs[0], weight, bias, case.doc_starts(), inputs[1])),
        (ops.rms_norm, (inputs[0], None, 1e-5, [4, 8], dtype)),
        (ops.rms_norm_backward, (inputs[0], bias, [12], scales, out)),
        (ops.rms_norm_backward, (inputs[0], None, [12], scales, out)),
        (ops.loss_statistics, (logits, labels)),
        (ops.loss_gradient, (logits.clone(), labels, sums, sums, sums)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_chunk_states_are_saved_only_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_states_saved_only_for_backward(CPU, cpu, monkeypatch)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("index", [0, 1, 2, 6])
def test_nan_inputs_give_nan_outputs(
    index: int, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' clamping does not hide a NaN of a diverging run."""
    monkeypatch.setattr(cpu, "instruction_set", lambda: instructions)
    inputs = [x.detach() for x in Case(1, 9, 16, 4).inputs(torch.float32)]
    inputs[index] = inputs[index].clone()
    inputs[index].view(-1)[0] = float("nan")
    assert CPU.selective_scan(*inputs)[0].isnan().any()
    weight = torch.full((16, 4), float("nan"))
    assert CPU.causal_conv1d(inputs[0], weight, torch.ones(16)).isnan().all()


@pytest.mark.parametrize("shape", [(1, 4, 16), (4, 1, 16), (1, 1, 16)])
def test_strides_of_axes_of_length_one_are_ignored(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape[1], shape[0], 64)[..., :16].transpose(0, 1)
    weight, bias = torch.randn(16, 4), torch.randn(16)
    expected = REFERENCE.causal_conv1d(x, weight, bias)
    torch.testing.assert_close(CPU.causal_conv1d(x, weight, bias), expected, rtol=1e-5, atol=1e-6)


def test_too_many_states_are_rejected() -> None:
    with pytest.raises(ValueError, match="d_state=33 exceeds"):
        CPU.selective_scan(*Case(1, 3, 16, 33).inputs(torch.float32))


def test_sizes_agree_with_the_source() -> None:
    library = cpu.active_library()
    assert library.chunk_steps() == SCAN_CHUNK
    assert library.vector_width() == cpu_library.VECTOR_WIDTHS[cpu.instruction_set()]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_equal_eager_ones(device: str) -> None:
    """Inductor gives the same losses and gradients, with one graph for all blocks and shapes."""
    generator = torch.Generator().manual_seed(1)
    kernels, (rtol, atol) = (CPU, (1e-6, 1e-7)) if device == "cpu" else (CUDA, (1e-4, 1e-6))
    eager, compiled = (model_of(TINY, kernels=kernels, device=device) for _ in range(2))
    compiled.set_recompute(Recompute.full)
    compiled.compile_blocks()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for batch, length in ((2, 32), (3, 48), (2, 20), (3, 32)):
        tokens = torch.randint(0, TINY.vocab_size, (batch, length + 1), generator=generator)
        tokens = tokens.to(device)
        doc_starts = (torch.rand(batch, length, generator=generator) < 0.1).to(device)
        expected, loss = (
            model(tokens[:, :-1], tokens[:, 1:], doc_starts)[0].mean()
            for model in (eager, compiled)
        )
        torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
        (expected + loss).backward()
    for expected, actual in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=rtol, atol=atol)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_model_compiles_and_runs_on_meta() -> None:
    tokens = torch.randint(0, TINY.vocab_size, (2, 21))
    model = model_of(TINY, kernels=CPU)
    expected = model(tokens[:, :-1], tokens[:, 1:])[0]
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:])[0], expected)
    with torch.device("meta"):
        logits = model_of(TINY, kernels=CPU, device="meta").logits(
            torch.empty(2, 20, dtype=torch.int64)
        )
    assert logits.shape == (2, 20, TINY.vocab_size)


def test_load_chooses_by_name_and_availability(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(Backend.reference, "cpu") is REFERENCE
    assert load(Backend.cpu, "cpu") is CPU
    assert load(Backend.auto, "cpu") is CPU
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load(Backend.auto, "cpu") is REFERENCE
    with pytest.raises(MissingBackend, match=r"apt-get install g\+\+"):
        load(Backend.cpu, "cpu")
    with pytest.raises(MissingBackend, match="set compute.kernels=auto"):
        load(Backend.cpu, "cuda")


def test_skipped_kernels_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no cuda-core: pip install 'cuda-core[cu13]'"
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: reason)
    lines = skipped_kernels(REFERENCE, "cuda")
    assert lines[0] == f"cuda: {reason}"
    assert len(lines) == 2 and lines[1].startswith("mamba_ssm: no ")
    assert skipped_kernels(MAMBA_SSM, "cuda") == lines[:1]
    assert skipped_kernels(CUDA, "cuda") == []
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    expected = "cuda: it is available: set compute.kernels=cuda"
    assert skipped_kernels(REFERENCE, "cuda")[0] == expected


def test_backward_cost_grows_linearly() -> None:
    """The memory that the reference's backward allocates grows linearly with the length."""
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
    actual = reference.rms_norm(x, None, 1e-6, [4, 2, 1], torch.float64)
    assert actual.dtype == torch.float64
    normed = [F.rms_norm(split, split.shape[-1:], eps=1e-6) for split in x.split([4, 2, 1], -1)]
    torch.testing.assert_close(actual.float(), torch.cat(normed, -1))
