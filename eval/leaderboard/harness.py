"""lm-evaluation-harness adapter of our model, with the scores of its HFLM on our export.

Requests and truncation are HFLM's too. Under torchrun every rank scores a part of each task's
documents and the harness gathers the results. Empty contexts start with end-of-text, because the
vocabulary has no begin token. Batches are padded on the right, never on the left.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict

from core.launcher import check_gpus
from core.ranges import Whole
from core.records import read_required
from data.tokenizer import load as load_tokenizer
from data.vocabulary import end_id
from eval.model_source import ModelSource, best_device, load_model
from model.config import Sampling
from model.mamba import FalconMamba

# the harness's request (texts, context ids, continuation ids)
TokenizedRequest = tuple[Any, list[int], list[int]]


class FalconMambaLM(TemplateLM):
    """FalconMamba with its tokenizer; a forward has at most `batch_tokens`, padding included."""

    def __init__(
        self,
        model: FalconMamba,
        tokenizer: Tokenizer,
        eos: int,
        max_length: int,
        batch_tokens: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.bpe_tokenizer = tokenizer
        self.eos = eos
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self._device = next(model.parameters()).device
        if dist.is_initialized():
            self._rank = dist.get_rank()
            self._world_size = dist.get_world_size()

    @property
    def eot_token_id(self) -> int:
        """End-of-text; also the context of requests without one."""
        return self.eos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text; the tokenizer adds no special tokens."""
        return list(self.bpe_tokenizer.encode(string, add_special_tokens=False).ids)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of full texts, in disjoint windows of max_length."""
        windows: list[TokenizedRequest] = []
        request_indices = []
        for index, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.eos,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                request_indices.append(index)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for index, (score, _) in zip(request_indices, scores, strict=True):
            totals[index] += score
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[TokenizedRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding produces it.

        Requests with the same model input share one forward, such as the one-token answers of a
        multiple choice.
        """
        requests_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length
            inputs = (context + continuation)[-(self.max_length + 1) : -1]
            requests_of[tuple(inputs)].append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        ordered = sorted(requests_of, key=lambda ids: (-len(ids), ids))
        hide_bar = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hide_bar, desc="loglikelihood") as bar:
            for batch in self._batches(ordered):
                for ids, hidden in zip(batch, self._hidden(batch), strict=True):
                    for index in requests_of[ids]:
                        results[index] = self._score(hidden[: len(ids)], requests[index][2])
                        bar.update()
        return results

    def _batches(self, ordered: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Split sequences, longest first, into batches of at most batch_tokens."""
        start = 0
        while start < len(ordered):
            count = max(1, self.batch_tokens // len(ordered[start]))
            yield ordered[start : start + count]
            start += count

    def _hidden(self, batch: list[tuple[int, ...]]) -> Tensor:
        """Hidden states [b, l, e]; padding on the right does not affect a causal model."""
        max_length = max(len(ids) for ids in batch)
        padded = [[*ids, *[self.eos] * (max_length - len(ids))] for ids in batch]
        return self.model.hidden(torch.tensor(padded, device=self._device))

    def _score(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Score a continuation that the last of the hidden states [l, e] predict."""
        targets = torch.tensor(continuation, device=hidden.device)
        log_probs = self.model.lm_head(hidden[-len(continuation) :]).float().log_softmax(-1)
        log_likelihood = log_probs.gather(1, targets.unsqueeze(1)).sum()
        return float(log_likelihood), bool((log_probs.argmax(-1) == targets).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate up to a stop sequence; batches have equal settings, longest prompts first."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
        outputs = [""] * len(requests)
        hide_bar = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hide_bar, desc="generate_until") as bar:
            for indices in groups.values():
                gen_kwargs = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
                end_text = self.bpe_tokenizer.id_to_token(self.eos)
                stops = handle_stop_sequences(gen_kwargs.get("until"), eos=end_text)
                max_prompt = self.max_length - gen_kwargs["max_gen_toks"]
                if max_prompt < 1:
                    raise ValueError(
                        f"max_gen_toks is {gen_kwargs['max_gen_toks']}, but must be below "
                        f"max_length {self.max_length}"
                    )
                texts = {index: requests[index].args[0] for index in indices}
                prompts = {
                    index: self.tok_encode(text)[-max_prompt:] for index, text in texts.items()
                }
                remaining = sorted(indices, key=lambda i: (-len(prompts[i]), texts[i]))
                while remaining:
                    count = max(1, self.batch_tokens // max(1, len(prompts[remaining[0]])))
                    batch = remaining[:count]
                    remaining = remaining[count:]
                    generated = self._generate([prompts[i] for i in batch], gen_kwargs, stops)
                    for index, output in zip(batch, generated, strict=True):
                        outputs[index] = output
                    bar.update(len(batch))
        return outputs

    @property
    def max_gen_toks(self) -> int:
        """Default number of generated tokens, as in HFLM."""
        return 256

    def _generate(
        self, prompts: list[list[int]], gen_kwargs: dict[str, Any], stops: list[str]
    ) -> list[str]:
        """Generate a batch of continuations, truncated at the first stop sequence."""
        do_sample = gen_kwargs.get("do_sample")
        sampling = Sampling(
            temperature=float(gen_kwargs.get("temperature", 0.0)) if do_sample else 0.0,
            top_k=int(gen_kwargs.get("top_k", 0)),
            top_p=float(gen_kwargs.get("top_p", 1.0)),
            seed=0,
        )
        texts = [""] * len(prompts)
        ids: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        # an empty prompt continues end-of-text
        prompts = [prompt or [self.eos] for prompt in prompts]
        for tokens in self.model.stream(prompts, gen_kwargs["max_gen_toks"], sampling):
            for row, token in enumerate(tokens.tolist()):
                if not done[row]:
                    ids[row].append(token)
                    texts[row] = self.bpe_tokenizer.decode(ids[row], skip_special_tokens=True)
                    done[row] = token == self.eos or any(
                        stop and stop in texts[row] for stop in stops
                    )
            if all(done):
                break
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack a scalar of every rank."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gather an object of every rank on rank dst."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def init_device() -> torch.device:
    """Return this process's device; under torchrun also create the process group."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        check_gpus(torch.cuda.device_count())
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


class EndToken(TypedDict):
    """What is read of a transformers folder's config.json."""

    eos_token_id: Whole


def _end_id(path: Path) -> int:
    fix = "name a complete transformers folder"
    return read_required(path, EndToken, fix, extra="ignore")["eos_token_id"]


def load_language_model(source: ModelSource, max_length: int, batch_tokens: int) -> Any:
    """Load a model as the lm-evaluation-harness class LM, on this process's device."""
    if source.tokenizer is None:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            str(source.folder),
            max_length=max_length,
            batch_size=max(1, batch_tokens // max_length),
            device=best_device(),
            dtype="float32",
            prefix_token_id=_end_id(source.folder / "config.json"),
        )
    model = load_model(source.folder, str(init_device()))
    tokenizer = load_tokenizer(source.tokenizer)
    eos = end_id(source.tokenizer, tokenizer)
    return FalconMambaLM(model, tokenizer, eos, max_length, batch_tokens)
