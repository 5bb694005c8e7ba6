"""The training loop: build once, then step from one token position to the next.

A step is a function of its position alone: schedule -> batch, context and rate; plan -> tokens; engine -> update.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.config import InputError
from data.loader import Batch, Loader, compile_plan, open_manifests
from eval.checkpoint import start_from
from eval.jobs import SuiteJobs
from eval.validation import Validation
from model.flops import parameter_count, train_flops_per_token
from model.kernels import MissingBackend, load
from model.parallel import build
from train.checkpoint import Checkpoints, State
from train.config import Precision, RunConfig
from train.distributed import Ranks
from train.engine import Engine, ZeroEngine
from train.metrics import Metrics
from train.schedule import Now, Schedule
from train.speed import memory_gib, peak_flops

MAX_SKIPPED = 10  # consecutive updates whose gradient was not finite; a restart would not cure that


class Trainer:
    """One rank's share of a run."""

    def __init__(self, config: RunConfig, ranks: Ranks, run_config: dict[str, Any]) -> None:
        """Build everything, go on from the newest checkpoint that verifies; `run_config` is config for the record."""
        self.config, self.ranks = config, ranks
        manifests = open_manifests(config.data)
        self.plan = compile_plan(config.data, manifests)
        self.loader = Loader(self.plan, manifests)
        self.schedule = Schedule(config.schedule, config.data)
        try:
            kernels = load(config.parallel.kernels, ranks.device.type)
        except MissingBackend as error:
            raise InputError(str(error)) from error
        self.model = build(
            config.model,
            kernels,
            config.run.seed,
            ranks.device,
            tp_rank=ranks.tp_rank,
            tp_size=ranks.tp_size,
            recompute=config.parallel.recompute,
        )
        start_from(self.model, config.run, ranks.tp_rank, ranks.tp_size)
        self.engine: Engine = ZeroEngine(self.model, config.optim, ranks)
        self.checkpoints = Checkpoints(config.run.checkpoints, config.checkpoint, ranks)
        self.state = State(0, 0, 0, self.plan.hash, asdict(config.model))
        self._resume()
        self.skipped = 0
        self.validation = Validation(
            config.data,
            config.eval.validation,
            bf16=config.parallel.precision is Precision.bf16,
            rank=ranks.dp_rank,
            ranks=ranks.dp_size,
            group=self._data_parallel_group(),
        )
        self.jobs = SuiteJobs(config.run, config.eval.jobs)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.metrics: Metrics | None = None
        if ranks.first:
            self._say(kernels.name)
        if ranks.first and self.state.tokens < self.schedule.total:
            self.peak = peak_flops(config.cluster, config.parallel.precision, ranks.device)
            arguments = (config.run.folder, config.run.name, config.metrics, run_config)
            self.metrics = Metrics(*arguments, tokens=self.state.tokens, total=self.schedule.total)

    def run(self) -> None:
        """Train to the end of the last stage."""
        try:
            self._steps()
        finally:
            self.reader.shutdown()
            if self.metrics is not None:
                self.metrics.close()

    def _steps(self) -> None:
        every = self.config.checkpoint.every_tokens
        pending = self._read(self.state.tokens)
        while self.state.tokens < self.schedule.total:
            begun = time.perf_counter()
            now = self.schedule.at(self.state.tokens)
            batches = pending.result()
            waited = time.perf_counter() - begun
            pending = self._read(self.state.tokens + now.tokens)
            result = self._step(now, batches)
            before, self.state.tokens = self.state.tokens, self.state.tokens + now.tokens
            self.state.step += 1
            seconds = time.perf_counter() - begun
            validation = self.validation.after(before, self.state.tokens, self.model)
            if self.metrics is not None:
                news = {"validation": validation, "scores": self.jobs.look()}
                record = self._record(now, result, seconds, waited)
                self.metrics.log(record | {key: value for key, value in news.items() if value is not None})
            if self.state.tokens // every > before // every or self.state.tokens == self.schedule.total:
                self.checkpoints.save(self.state, self.engine)

    def _step(self, now: Now, batches: list[tuple[Batch, bool]]) -> dict[str, Any]:
        """Forward, backward and update of one global batch; returns the losses and norms of the step."""
        sums = torch.zeros(2, len(self.plan.sources), dtype=torch.float64)  # nats and tokens of each source
        autocast = self.config.parallel.precision is Precision.bf16
        for index, (batch, counts) in enumerate(batches):
            batch = batch.to(self.ranks.device)
            # without its cache, which would hold a bf16 copy of every weight until the forward ends
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
                losses, log_sums = self.model(batch.tokens, batch.targets, batch.starts)
            total = losses.sum()
            if self.config.optim.z_loss > 0:
                total = total + self.config.optim.z_loss * log_sums.square().sum()
            # the mean over the tokens of the global batch, whoever holds them
            self.engine.backward(total * (counts / now.tokens), last=index == len(batches) - 1)
            if counts:
                self._count(sums, batch.source, losses.detach())
        grad_norm, skipped = self.engine.clip_and_step(now.lr)
        dist.all_reduce(sums, group=self._data_parallel_group())
        self.skipped = self.skipped + 1 if skipped else 0
        self.state.updates += not skipped
        if self.skipped > MAX_SKIPPED:
            raise InputError(
                f"{self.skipped} updates in a row had gradients that are not finite, up to step {self.state.step}; "
                "lower schedule.peak_lr or optim.clip_norm and start from an earlier checkpoint"
            )
        return {"sums": sums, "grad_norm": grad_norm, "skipped": skipped}

    @staticmethod
    def _count(sums: Tensor, source: Tensor, losses: Tensor) -> None:
        """Add a micro-batch's losses [b, l] and tokens to the rows of its sources [b]."""
        source = source.cpu()
        sums[0].index_add_(0, source, losses.double().sum(1).cpu())
        sums[1].index_add_(0, source, torch.full(source.shape, losses.shape[1], dtype=torch.float64))

    def _record(self, now: Now, result: dict[str, Any], seconds: float, waited: float) -> dict[str, Any]:
        """One line of metrics.jsonl; rates are of the whole run, losses in nats per token."""
        nats, tokens = result["sums"].tolist()
        rate = now.tokens / seconds
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": sum(nats) / sum(tokens),
            "source_loss": {name: n / t for name, n, t in zip(self.plan.sources, nats, tokens, strict=True) if t},
            "grad_norm": result["grad_norm"],
            "skipped": result["skipped"],
            "lr": now.lr,
            "batch": now.batch,
            "seq_len": now.seq_len,
            "stage": now.stage,
            "tokens_per_second": rate,
            "mfu": rate * train_flops_per_token(self.config.model) / (self.peak * self.ranks.world_size),
            "memory_gib": memory_gib(self.ranks.device),
            "data_wait_seconds": waited,
            "step_seconds": seconds,
        }

    def _read(self, token: int) -> "Future[list[tuple[Batch, bool]]]":
        """This rank's micro-batches of the step at `token`, read in the background while the step before computes."""
        if token >= self.schedule.total:
            return self.reader.submit(list)
        now = self.schedule.at(token)
        micro_batch = self.config.parallel.micro_batch_tokens // now.seq_len
        share = self.loader.share(token, now.batch, self.ranks.dp_rank, self.ranks.dp_size, micro_batch)
        return self.reader.submit(lambda: list(share))

    def _resume(self) -> None:
        """Load the newest valid checkpoint, and refuse one of another run."""
        folder = self.checkpoints.find()
        if folder is None:
            return
        state = self.checkpoints.load(folder, self.engine)
        hint = "restore the config it was trained with, or choose another run.name"
        if state.model != self.state.model:
            raise InputError(f"{folder} holds another model; {hint}")
        if state.plan != self.plan.hash:
            raise InputError(f"{folder} was trained on another data plan (sources, stages, seed or shards); {hint}")
        self.state = state

    def _say(self, kernels: str) -> None:
        """The run in a few lines, before it starts."""
        count, ranks = parameter_count(self.config.model), self.ranks
        print(
            f"run {self.config.run.name}: {count:,} parameters, {self.schedule.total:,} tokens, "
            f"{ranks.world_size} ranks on {ranks.device.type} (data {ranks.dp_size} x tensor {ranks.tp_size}), "
            f"kernels {kernels}",
            flush=True,
        )
        epochs = ", ".join(f"{name} {value:.2f}" for name, value in self.plan.epochs().items())
        print(f"epochs over the run: {epochs}", flush=True)
        if kernels == "reference" and ranks.device.type == "cuda":
            print("warning: the reference kernels are far too slow for a GPU run", flush=True)
        if self.state.tokens == self.schedule.total:
            print(f"reused: the run is complete at step {self.state.step}", flush=True)
        elif self.state.tokens:
            print(f"going on at step {self.state.step}, {self.state.tokens:,} tokens", flush=True)

    @staticmethod
    def _data_parallel_group() -> Any:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group()
