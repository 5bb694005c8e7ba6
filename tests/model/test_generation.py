"""Recurrent decoding: the same tokens and states as the whole sequence gives, in batches and in
chunks.
"""

from dataclasses import replace

import pytest
import torch

from model import generation
from model.config import Backend, Sampling
from model.decode import Decoder
from model.generation import GREEDY, sample
from model.kernels import CUDA, REFERENCE, load
from model.kernels.interface import Kernels
from model.mamba import FalconMamba
from tests.gpu import ON_GPU
from tests.tiny import TINY, model_of

PROMPTS = [[12, 40, 7, 33, 21, 9], [50], [13, 14, 15, 16, 17, 18, 19, 20, 90, 91, 92, 93, 94]]


@pytest.fixture(params=["reference", "auto", pytest.param("cuda", marks=ON_GPU)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return {"reference": REFERENCE, "auto": load(Backend.auto, "cpu"), "cuda": CUDA}[request.param]


def tiny(kernels: Kernels, seed: int = 0, norms: bool = True) -> FalconMamba:
    """The small model on the device of the kernels."""
    device = "cuda" if kernels is CUDA else "cpu"
    return model_of(replace(TINY, mixer_norms=norms), seed, kernels, device)


@pytest.mark.parametrize("tokens", [1, 7, 4096])
def test_prompts_of_any_length_in_chunks(
    kernels: Kernels, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a padded batch, read in chunks, ends in the state that it reaches alone and
    whole.
    """
    monkeypatch.setattr("model.generation.PREFILL_TOKENS", tokens)
    model = tiny(kernels)
    hidden, state = model.prefill(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone, layers = model.forward_chunk(torch.tensor([prompt], device=hidden.device))
        torch.testing.assert_close(hidden[row], alone[0, -1], rtol=1e-5, atol=1e-6)
        for batched, single in zip(state, layers, strict=True):
            torch.testing.assert_close(
                batched.ssm_state[row], single.ssm_state[0], rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                batched.conv_state[row], single.conv_state[0], rtol=1e-5, atol=1e-6
            )


def test_greedy_decoding_is_the_argmax_of_the_whole_sequence(kernels: Kernels) -> None:
    model = tiny(kernels, seed=2)
    steps = torch.stack(list(model.stream(PROMPTS, 20, GREEDY)), 1)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*prompt, *steps[row].tolist()]], device=steps.device)
        with torch.no_grad():
            expected = model.logits(ids)[0, len(prompt) - 1 : -1].argmax(-1)
        assert torch.equal(steps[row], expected), row


@pytest.mark.parametrize("norms", [True, False])
def test_the_step_is_the_models_own(kernels: Kernels, norms: bool) -> None:
    """Scores and states of many single steps against forward_chunk; plain Mamba too."""
    model = tiny(kernels, 1, norms)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(parameter))
            )
            parameter.add_(0.1 * noise.to(parameter.device))
    _, state = model.prefill(PROMPTS)
    decoder = Decoder(model, state)
    for step in range(12):
        tokens = torch.tensor([13 + step, 20, 90 - step], device=model.lm_head.weight.device)
        with torch.no_grad():
            hidden, state = model.forward_chunk(tokens.unsqueeze(1), state)
            expected = model.lm_head(hidden[:, 0])
        torch.testing.assert_close(decoder(tokens), expected, rtol=1e-5, atol=1e-5)
    for conv_state, ssm_state, theirs in zip(
        decoder.conv_states, decoder.ssm_states, state, strict=True
    ):
        torch.testing.assert_close(ssm_state, theirs.ssm_state, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(conv_state, theirs.conv_state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_the_cuda_graph_is_the_step(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with the step launched kernel by kernel."""
    model = tiny(kernels)
    captured = list(model.stream(PROMPTS, 30))
    monkeypatch.setattr(Decoder, "_capture", lambda decoder: None)
    plain = list(model.stream(PROMPTS, 30))
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))


def test_the_padding_is_forgotten_only_by_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mark of the first token the padding would show: the test above can fail."""
    model = model_of(TINY)
    expected, _ = model.prefill(PROMPTS)
    forward_chunk = model.forward_chunk
    monkeypatch.setattr(
        model, "forward_chunk", lambda tokens, state, doc_starts: forward_chunk(tokens, state, None)
    )
    unmarked, _ = model.prefill(PROMPTS)
    assert (unmarked[1] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(unmarked[2], expected[2])


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20_000, 4).contiguous()
    generator = torch.Generator().manual_seed(0)

    def frequencies(sampling: Sampling) -> torch.Tensor:
        return torch.bincount(sample(logits, sampling, generator), minlength=4) / len(logits)

    assert torch.equal(frequencies(GREEDY), torch.tensor([0.0, 0, 0, 1]))
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(2.0, 0, 1.0, 0)), expected, rtol=0, atol=0.02)
    kept = (
        torch.tensor([0.0, 0, 2, 3])
        .masked_fill(torch.tensor([1, 1, 0, 0]).bool(), -torch.inf)
        .softmax(-1)
    )
    torch.testing.assert_close(frequencies(Sampling(1.0, 2, 1.0, 0)), kept, rtol=0, atol=0.02)
    # 0.64 + 0.24 >= 0.7
    torch.testing.assert_close(frequencies(Sampling(1.0, 0, 0.7, 0)), kept, rtol=0, atol=0.02)
    assert frequencies(Sampling(1.0, 0, 0.6, 0))[3] == 1


def test_generate_gives_ids_up_to_an_end() -> None:
    """As `stream` yields them, and after a row's end the end again."""
    model = model_of(TINY, seed=2)
    whole = torch.stack(list(model.stream(PROMPTS, 20)), 1)
    assert torch.equal(model.generate(PROMPTS, 20), whole) and whole.shape == (3, 20)
    stop = int(whole[0, 4])
    ended = model.generate(PROMPTS, 20, stop=stop)
    for row, full in zip(ended, whole, strict=True):
        end = (full == stop).nonzero().flatten()
        count = int(end[0]) + 1 if len(end) else len(full)
        assert torch.equal(row[:count], full[:count]) and (row[count:] == stop).all()
    alone = model.generate(PROMPTS[:1], 20, stop=stop)
    assert alone.shape[1] == int((whole[0] == stop).nonzero()[0]) + 1, "it ends when all rows have"


def test_a_seed_gives_the_same_text_again() -> None:
    model = model_of(TINY)

    def drawn(seed: int) -> list[int]:
        return [int(token) for token in model.stream([[12]], 30, Sampling(1.0, 0, 1.0, seed))]

    assert drawn(1) == drawn(1) != drawn(2)


def test_one_token_builds_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUDA graph, and no compiled step, for a token that the prompt's logits give."""
    model = model_of(TINY)
    expected = model.generate([[5, 6, 7]], count=2)[:, :1]
    monkeypatch.setattr(generation, "Decoder", None)
    assert torch.equal(model.generate([[5, 6, 7]], count=1), expected)
    assert len(list(model.stream([[5, 6, 7]], 1, compiled=True))) == 1
