"""The training loop: build once, then step from one token position to the next.

A step is a function of its position alone: schedule -> batch, context and rate; plan -> tokens;
engine -> update. What goes wrong on the way is train/resilience/guard.py's, which decides from
values that all ranks share.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError
from core.run import Run
from data.stream.loader import Batch, Loader, compile_plan
from data.stream.manifests import Manifest
from eval.heldout import Validation
from eval.leaderboard.jobs import SuiteJobs
from model.flops import parameter_count, train_flops_per_token
from model.hf import initialize_from
from model.kernels import REFERENCE, Kernels, MissingBackend, load, passed_over
from model.mamba import FalconMamba
from model.parallel.build import build
from train.checkpoint.manager import Checkpoints, State
from train.config import Compute, Precision, RunConfig
from train.device import memory_gib, peak_flops
from train.distributed import Ranks, context_ranks, data_parallel_group, raise_everywhere
from train.engines.build import build_engine
from train.engines.protocol import Engine
from train.metrics.records import read_scores
from train.metrics.scores import collecting
from train.metrics.sinks import Metrics
from train.resilience.datacheck import DataCheck
from train.resilience.guard import LONG_PATIENCE, Guard
from train.resilience.incidents import FINISHED, REQUEUE, Outcome, Starts
from train.resilience.signals import Leave
from train.resilience.watchdog import Watch
from train.schedule import Now, Schedule
from train.step_stats import Exchange, Told, count

logger = logging.getLogger(__name__)


def kernels_of(config: Compute, device: str) -> Kernels:
    """The kernels that a run takes; InputError when they are missing, or cannot be compiled
    around.
    """
    try:
        kernels = load(config.kernels, device)
    except MissingBackend as error:
        raise InputError(str(error)) from error
    if config.compile and kernels is REFERENCE:  # which torch.compile would unroll, token by token
        raise InputError(
            "compute.compile=true is for blocks around kernels, and the reference kernels are a "
            "loop over tokens: set compute.compile=false, or another compute.kernels"
        )
    return kernels


def start_from(model: FalconMamba, run: Run, tp_rank: int, tp_size: int) -> None:
    """Initial weights out of the folder that run.init_from names, if it names one."""
    if run.init_from is not None:
        try:
            initialize_from(model, Path(run.init_from), tp_rank, tp_size)
        except InputError as error:
            raise InputError(f"run.init_from: {error}") from error


class Trainer:
    """One rank's share of a run."""

    def __init__(
        self,
        config: RunConfig,
        manifests: dict[str, Manifest],
        ranks: Ranks,
        run_config: dict[str, Any],
        watch: Watch,
        leave: Leave,
    ) -> None:
        """Build everything, go on from the newest checkpoint that verifies; `run_config` is config
        for the record.
        """
        self.config, self.ranks, self.watch, self.leave = config, ranks, watch, leave
        self.datacheck = DataCheck(config.data, manifests, ranks)
        self.datacheck.start(config.health.verify_shards)
        self.plan = compile_plan(config.data, manifests)
        self.loader = Loader(self.plan, manifests)
        self.schedule = Schedule(config)
        kernels = kernels_of(config.compute, ranks.device.type)
        self.model = build(
            config.model,
            kernels,
            config.run.seed,
            ranks.device,
            tp_rank=ranks.tp_rank,
            tp_size=ranks.tp_size,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.compute.recompute,
        )
        self.context = context_ranks() if ranks.cp_size > 1 else None
        self.model.set_context(self.context)
        edges = frozenset(end for end, _, _ in self.schedule.edges)
        self.checkpoints = Checkpoints(
            config.run.files.checkpoints, config.checkpoint, ranks, edges
        )
        found = self.checkpoints.find()
        if found is None:
            start_from(self.model, config.run, ranks.tp_rank, ranks.tp_size)
        if config.compute.compile:
            self.model.compile_blocks()
        self.engine: Engine = build_engine(
            self.model, config.optim, config.parallel, config.compute.precision, ranks
        )
        self.state = State(0, 0, 0, self.plan.hash, asdict(config.model))
        self.guard = Guard(config.health, ranks, self.model, self.engine, self.checkpoints, watch)
        self._resume(found)
        self._count_start()
        self.exchange = Exchange(ranks, len(self.plan.sources))
        self.validation = Validation(
            config.data,
            manifests,
            config.validation,
            bf16=config.compute.precision is Precision.bf16,
            rank=ranks.replica,  # the group holds context-parallel ranks too
            ranks=ranks.replicas,
            group=data_parallel_group(),
        )
        decay = self.schedule.total - config.schedule.decay_tokens
        before_decay = max((end for end in edges if end <= decay), default=decay)
        self.jobs = SuiteJobs(
            config.run,
            config.leaderboard.jobs,
            always={before_decay, self.schedule.total},
            after=collecting(config.run.folder),
        )
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.metrics: Metrics | None = None
        if ranks.first:
            self._say(kernels)
        if ranks.first and self.state.tokens < self.schedule.total:
            self.peak = peak_flops(config.cluster, config.compute.precision, ranks.device)
            arguments = (config.run.folder, config.run.name, config.metrics, run_config)
            self.metrics = Metrics(*arguments, tokens=self.state.tokens, total=self.schedule.total)
            self.jobs.know(read_scores(self.metrics.file.path))

    def run(self) -> Outcome:
        """Train to the end of the last stage, or until somebody asks this run to leave."""
        try:
            why = self._steps()
            if self.state.step > self.loaded_step:
                self.guard.leave(self.state)
            self._score(now=True)
        except InputError:  # raised on every rank alike, so that a save in flight can end
            self.checkpoints.writer.wait()
            raise
        finally:
            self.reader.shutdown(wait=False, cancel_futures=True)
            if self.metrics is not None:
                self.metrics.close()
        if self.state.tokens == self.schedule.total:
            return Outcome(FINISHED, f"all {self.state.tokens:,} tokens are behind it")
        return Outcome(REQUEUE, f"{why}; saved at step {self.state.step}")

    def _steps(self) -> str | None:
        """Step until the end, or until any rank has been asked to leave; returns why."""
        pending = self._read(self.state.tokens)
        while self.state.tokens < self.schedule.total:
            begun = time.perf_counter()
            now = self.schedule.at(self.state.tokens)
            self.watch.at(self.state.step, "read")
            batches = pending.result()
            waited = time.perf_counter() - begun
            pending = self._read(self.state.tokens + now.tokens)
            result = self._step(now, batches, waited)
            before, self.state.tokens = self.state.tokens, self.state.tokens + now.tokens
            self.state.step += 1
            seconds = time.perf_counter() - begun
            self.watch.at(self.state.step, "validate", LONG_PATIENCE)
            with self.model.whole_sequences():
                validation = self.validation.after(before, self.state.tokens, self.model)
            self.watch.at(self.state.step, "log")
            if self.metrics is not None:
                record = self._record(now, result, seconds, waited)
                record |= {} if validation is None else {"validation": validation}
                self.metrics.log(record, self.checkpoints.standing())
                self._score()
            if result["told"].bad_data:
                raise_everywhere(self.datacheck.fault)
            self.guard.after(self.state, before, result["told"])
            if result["told"].leave:
                return self.leave.why or "another rank was asked to leave"
        return None

    def _step(self, now: Now, batches: list[tuple[Batch, bool]], waited: float) -> dict[str, Any]:
        """Forward, backward and update of one global batch; returns the losses and norms of the
        step.
        """
        # nats and tokens of each source
        sums = torch.zeros(2, len(self.plan.sources), dtype=torch.float64)
        autocast = self.config.compute.precision is Precision.bf16
        # seconds of this rank's own work: reading and forward passes, which wait for no other rank
        own = waited
        for index, (batch, counts) in enumerate(batches):
            self.watch.at(self.state.step, "forward")
            begun = time.perf_counter()
            batch = batch.to(self.ranks.device)
            if self.context is not None:
                batch = batch.pieces(self.context.piece)
            # without its cache, which would hold a bf16 copy of every weight until the forward ends
            with torch.autocast(
                self.ranks.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False
            ):
                losses, log_sums = self.model(batch.tokens, batch.targets, batch.starts)
            total = losses.sum()
            if self.config.optim.z_loss > 0:
                total = total + self.config.optim.z_loss * log_sums.square().sum()
            if counts:
                # waits for the device, so that the time is the work's
                count(sums, batch.source, losses.detach())
            own += time.perf_counter() - begun
            self.watch.at(self.state.step, "backward")
            # the mean over the tokens of the global batch, whoever holds them
            self.engine.backward(total * (counts / now.tokens), last=index == len(batches) - 1)
        self.watch.at(self.state.step, "agree")
        told = self.exchange.tell(
            sums,
            own / len(batches),
            leave=self.leave.asked() is not None,
            save=self.ranks.first and self.checkpoints.wants_retry,
            bad_data=self.datacheck.fault is not None,
        )
        self.watch.at(self.state.step, "update")
        return {"told": told, **self.guard.update(self.state, now, told.loss)}

    def _score(self, *, now: bool = False) -> None:
        """Start the suites that are due, and record what others have found."""
        if self.metrics is not None:
            for record in self.jobs.look(now=now):
                self.metrics.log_scores(record)

    def _record(
        self, now: Now, result: dict[str, Any], seconds: float, waited: float
    ) -> dict[str, Any]:
        """One line of metrics.jsonl; rates are of the whole run, losses in nats per token."""
        rate = now.tokens / seconds
        told: Told = result["told"]
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": told.loss,
            "source_loss": {
                name: n / t for name, n, t in zip(self.plan.sources, *told.sums, strict=True) if t
            },
            "source_tokens": {
                name: int(t) for name, t in zip(self.plan.sources, told.sums[1], strict=True) if t
            },
            "grad_norm": result["grad_norm"],
            "skipped": result["skipped"],
            "lr": now.lr,
            "batch": now.batch,
            "seq_len": now.seq_len,
            "stage": now.stage,
            "tokens_per_second": rate,
            "mfu": rate
            * train_flops_per_token(self.config.model)
            / (self.peak * self.ranks.world_size),
            "memory_gib": memory_gib(self.ranks.device),
            "data_wait_seconds": waited,
            "step_seconds": seconds,
        }

    def _read(self, token: int) -> "Future[list[tuple[Batch, bool]]]":
        """This rank's micro-batches of the step at `token`, read in the background while the step
        before computes.
        """
        if token >= self.schedule.total:
            return self.reader.submit(list)
        now = self.schedule.at(token)
        micro_batch = self.config.parallel.micro_batch_tokens // now.seq_len
        where = (self.ranks.dp_rank, self.ranks.dp_size, micro_batch, self.engine.in_step)
        share = self.loader.share(token, now.batch, *where)
        return self.reader.submit(lambda: list(share))

    def _resume(self, folder: Path | None) -> None:
        """Load the newest valid checkpoint, if there is one, and refuse that of another run."""
        self.loaded_step = 0
        if folder is None:
            return
        state = self.checkpoints.load(folder, self.engine)
        hint = "restore the config it was trained with, or choose another run.name"
        if state.model != self.state.model:
            raise InputError(f"{folder} holds another model; {hint}")
        if state.plan != self.plan.hash:
            raise InputError(
                f"{folder} was trained on another data plan (sources, stages, seed or shards); "
                f"{hint}"
            )
        self.state, self.loaded_step = state, state.step
        self.guard.health.load(state.health)

    def _count_start(self) -> None:
        """Refuse a start that would only crash again."""
        why = None
        if self.ranks.first and self.state.tokens < self.schedule.total:
            starts = Starts(self.config.run.folder, self.config.health.max_starts)
            why = starts.count(self.state.tokens, self.watch.incidents)
        raise_everywhere(why)

    def _say(self, kernels: Kernels) -> None:
        """The run in a few lines, before it starts."""
        count, ranks = parameter_count(self.config.model), self.ranks
        logger.info(
            f"run {self.config.run.name}: {count:,} parameters, {self.schedule.total:,} tokens, "
            f"{ranks.world_size} ranks on {ranks.device.type} "
            f"(data {ranks.dp_size} x context {ranks.cp_size} x tensor {ranks.tp_size}), "
            f"kernels {kernels.name}"
        )
        epochs = ", ".join(f"{name} {value:.2f}" for name, value in self.plan.epochs().items())
        logger.info(f"epochs over the run: {epochs}")
        if kernels.name == "reference" and ranks.device.type == "cuda":
            logger.warning("the reference kernels are far too slow for a GPU run")
        for line in passed_over(kernels, ranks.device.type):
            logger.info(f"faster kernels are not used: {line}")
        if self.state.tokens == self.schedule.total:
            logger.info(f"reused: the run is complete at step {self.state.step}")
        elif self.state.tokens:
            logger.info(f"going on at step {self.state.step}, {self.state.tokens:,} tokens")
