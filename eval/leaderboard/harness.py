"""Our model as lm-evaluation-harness sees one: same requests, same cuts and same scores as its HFLM
on our export.

Under torchrun every rank takes its share of each task's documents and the harness gathers the
results. The prefix of empty contexts is end-of-text (the vocabulary has no begin token), and
nothing is ever padded on the left without being forgotten.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
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

from data.tokenizer import EOS, EOS_TOKEN
from data.tokenizer import load as load_tokenizer
from eval.model_source import ModelSource, best_device, model_from_checkpoint
from model.checkpoint import read_state
from model.config import ModelConfig, Sampling
from model.mamba import FalconMamba

Pair = tuple[Any, list[int], list[int]]  # what was asked, context ids, continuation ids


class FalconMambaLM(TemplateLM):
    """A FalconMamba with its tokenizer; `batch_tokens` bounds a forward, padding included."""

    def __init__(
        self, model: FalconMamba, tokenizer: Tokenizer, max_length: int, batch_tokens: int
    ) -> None:
        super().__init__()
        self.model, self.vocabulary = model, tokenizer
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self._device = next(model.parameters()).device
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @property
    def eot_token_id(self) -> int:
        """End of text, which also precedes texts without a context."""
        return EOS

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; the vocabulary adds no special tokens of its own."""
        return list(self.vocabulary.encode(string, add_special_tokens=False).ids)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in disjoint windows of max_length."""
        windows: list[Pair] = []
        owners = []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=EOS,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[owner] += score
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it.

        Requests that feed the model the same tokens share one row: the letters of a multiple choice
        cost one forward.
        """
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length
            rows[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        hidden_bar = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden_bar, desc="loglikelihood") as bar:
            for batch in self._batches(ordered):
                hidden = self._hidden(batch)
                for row, states in zip(batch, hidden, strict=True):
                    for number in rows[row]:
                        results[number] = self._score(states[: len(row)], requests[number][2])
                        bar.update()
        return results

    def _batches(self, ordered: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of falling length, as many at once as batch_tokens hold."""
        start = 0
        while start < len(ordered):
            count = max(1, self.batch_tokens // len(ordered[start]))
            yield ordered[start : start + count]
            start += count

    def _hidden(self, batch: list[tuple[int, ...]]) -> Tensor:
        """Final states [b, l, e] of rows padded on the right, which no row's own tokens see."""
        longest = max(len(row) for row in batch)
        ids = torch.tensor(
            [[*row, *[EOS] * (longest - len(row))] for row in batch], device=self._device
        )
        return self.model.hidden(ids)

    def _score(self, states: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """states [l, e], whose last ones predict the continuation."""
        targets = torch.tensor(continuation, device=states.device)
        scores = self.model.lm_head(states[-len(continuation) :]).float().log_softmax(-1)
        chosen = scores.gather(1, targets.unsqueeze(1)).sum()
        return float(chosen), bool((scores.argmax(-1) == targets).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text; a batch shares its settings, longest prompts first."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        answers = [""] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="generate_until"
        ) as bar:
            for numbers in groups.values():
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                stops = handle_stop_sequences(settings.get("until"), eos=EOS_TOKEN)
                room = self.max_length - settings["max_gen_toks"]
                if room < 1:
                    raise ValueError(
                        f"max_gen_toks {settings['max_gen_toks']} leaves no room in "
                        f"{self.max_length}"
                    )
                prompts = {
                    number: self.tok_encode(requests[number].args[0])[-room:] for number in numbers
                }
                ordered = sorted(
                    numbers, key=lambda number: (-len(prompts[number]), requests[number].args[0])
                )
                while ordered:
                    count = max(1, self.batch_tokens // max(1, len(prompts[ordered[0]])))
                    now, ordered = ordered[:count], ordered[count:]
                    texts = self._continue([prompts[number] for number in now], settings, stops)
                    for number, text in zip(now, texts, strict=True):
                        answers[number] = text
                    bar.update(len(now))
        return answers

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated when a task does not say how many; HFLM's value."""
        return 256

    def _continue(
        self, prompts: list[list[int]], settings: dict[str, Any], stops: list[str]
    ) -> list[str]:
        """Texts after prompts, cut at the first stop."""
        sampling = Sampling(
            temperature=float(settings.get("temperature", 0.0))
            if settings.get("do_sample")
            else 0.0,
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
            seed=0,
        )
        texts = [""] * len(prompts)
        ids: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        # an empty prompt continues end-of-text
        filled = [prompt or [EOS] for prompt in prompts]
        for tokens in self.model.stream(filled, settings["max_gen_toks"], sampling):
            for row, token in enumerate(tokens.tolist()):
                if not done[row]:
                    ids[row].append(token)
                    texts[row] = self.vocabulary.decode(ids[row], skip_special_tokens=True)
                    done[row] = token == EOS or any(stop and stop in texts[row] for stop in stops)
            if all(done):
                break
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A scalar of every rank, as one tensor."""
        if self.world_size == 1:
            return tensor
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(everyone, tensor)
        return torch.stack(everyone)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Results of all ranks on rank dst."""
        if self.world_size == 1:
            return [obj]
        everyone: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, everyone, dst=dst)
        return everyone

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def device_here() -> torch.device:
    """This process's device; under torchrun also its process group."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def language_model(source: ModelSource, max_length: int, batch_tokens: int) -> Any:
    """A subject as lm-evaluation-harness wants it, on this process's device."""
    if source.tokenizer is None:
        from lm_eval.models.huggingface import HFLM

        rows = max(1, batch_tokens // max_length)
        return HFLM(
            str(source.folder),
            max_length=max_length,
            batch_size=rows,
            device=best_device(),
            dtype="float32",
            prefix_token_id=EOS,
        )
    shape, device = ModelConfig(**read_state(source.folder)["model"]), device_here()
    vocabulary = load_tokenizer(source.tokenizer)
    return FalconMambaLM(
        model_from_checkpoint(shape, source.folder, device), vocabulary, max_length, batch_tokens
    )
