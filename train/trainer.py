"""The training loop; train/build.py builds its parts.

A step is a function of its token position: the schedule gives batch, sequence length and learning
rate, the data plan the tokens, the engine the update. When a step goes wrong,
train/resilience/failure_policy.py decides from values that all ranks share.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from data.stream.loader import Batch
from data.stream.mixture import Plan
from eval.heldout import Validation
from eval.leaderboard.jobs import SuiteJobs
from model.mamba import FalconMamba
from model.parallel.context import ContextRanks
from train.batches import Batches, MicroBatches
from train.checkpoint.manager import CheckpointManager, TrainState
from train.device import peak_memory_gib
from train.distributed import Ranks, raise_on_all_ranks
from train.engines.protocol import Engine
from train.metrics.sinks import Metrics
from train.phases import LONG_PATIENCE, Phases
from train.resilience.datacheck import DataCheck
from train.resilience.failure_policy import FailurePolicy
from train.resilience.incidents import INTERRUPTED, Outcome
from train.resilience.stop_request import StopRequest
from train.schedule import Schedule, StepSchedule
from train.step_stats import StepStats, add_losses, reduce_step_stats


@dataclass
class Trainer:
    """The training loop of one rank."""

    ranks: Ranks
    schedule: Schedule
    plan: Plan
    batches: Batches
    model: FalconMamba
    context: ContextRanks | None  # ranks that share a sequence
    engine: Engine
    z_loss: float
    bf16: bool
    checkpoints: CheckpointManager
    failure_policy: FailurePolicy
    datacheck: DataCheck
    validation: Validation
    jobs: SuiteJobs
    metrics: Metrics | None  # of the first rank, unless the run is complete
    phases: Phases
    stop_request: StopRequest
    state: TrainState
    has_initial_weights: bool  # this start loaded them: their held-out loss is the first record

    def run(self) -> Outcome:
        """Train to the end of the last stage, or until a stop is requested."""
        loaded_step = self.state.step
        try:
            if self.has_initial_weights:
                self._validate_initial_weights()
            stop_reason = self._steps()
            if self.state.step > loaded_step:
                self.failure_policy.final_save(self.state)
            self._poll_leaderboard(now=True)
        except InputError:  # raised on every rank, so that a save in flight can end
            self.checkpoints.writer.wait()
            raise
        finally:
            self.batches.close()
            if self.metrics is not None:
                self.metrics.close()
        if self.state.tokens == self.schedule.total:
            return self.failure_policy.final_outcome(self.state)
        text = f"{stop_reason}: the same command continues from step {self.state.step:,}"
        return Outcome(INTERRUPTED, text)

    def _steps(self) -> str | None:
        """Step until the end or a stop request on any rank; return the reason of the stop."""
        while self.state.tokens < self.schedule.total:
            started_at = time.perf_counter()
            step_schedule = self.schedule.at(self.state.tokens)
            self.phases.enter(self.state.step, "read")
            batches = self.batches.read(self.state.tokens)
            data_wait_seconds = time.perf_counter() - started_at
            result = self._step(step_schedule, batches, data_wait_seconds)
            before = self.state.tokens
            self.state.tokens += step_schedule.tokens
            self.state.step += 1
            self.state.plan = self.plan.hash_at(self.state.tokens)
            seconds = time.perf_counter() - started_at
            self.phases.enter(self.state.step, "validate", LONG_PATIENCE)
            with self.model.without_context_parallel():
                validation = self.validation.run_if_due(
                    before, self.state.tokens, self.schedule.total, self.model
                )
            self.phases.enter(self.state.step, "log")
            if self.metrics is not None:
                record = self._record(step_schedule, result, seconds, data_wait_seconds)
                if validation is not None:
                    record["validation"] = validation
                self.metrics.log(record, self.checkpoints.status())
                self._poll_leaderboard()
            if result["stats"].bad_data:
                raise_on_all_ranks(self.datacheck.error)
            self.failure_policy.after_step(self.state, before, result["stats"])
            if result["stats"].stop:
                return self.stop_request.why or "stopped by a signal to another rank"
        return None

    def _validate_initial_weights(self) -> None:
        self.phases.enter(self.state.step, "validate", LONG_PATIENCE)
        with self.model.without_context_parallel():
            validation = self.validation.run(self.model)
        if self.metrics is not None and validation:
            self.metrics.log_initial(validation)

    def _step(
        self, step_schedule: StepSchedule, batches: MicroBatches, data_wait_seconds: float
    ) -> dict[str, Any]:
        """Run forward, backward and update of one global batch; return statistics and norm."""
        # nats and tokens of each source
        sums = torch.zeros(2, len(self.plan.sources), dtype=torch.float64)
        # reading and forward passes, which wait for no other rank
        compute_seconds = data_wait_seconds
        for index, (batch, is_padding) in enumerate(batches):
            self.phases.enter(self.state.step, "forward")
            started_at = time.perf_counter()
            losses, total = self._forward(batch)
            if not is_padding:
                # synchronizes with the device, so that the time covers the forward
                add_losses(sums, batch.source, losses.detach())
            compute_seconds += time.perf_counter() - started_at
            self.phases.enter(self.state.step, "backward")
            # gradients sum over ranks to the mean over the tokens of the global batch
            weight = 0.0 if is_padding else 1 / step_schedule.tokens
            self.engine.backward(total * weight, last=index == len(batches) - 1)
        self.phases.enter(self.state.step, "reduce_stats")
        stats = reduce_step_stats(
            self.ranks,
            sums,
            compute_seconds / len(batches),
            stop=self.stop_request.reason() is not None,
            save=self.ranks.is_first and self.checkpoints.retry_due,
            bad_data=self.datacheck.error is not None,
        )
        self.phases.enter(self.state.step, "update")
        return {"stats": stats, **self.failure_policy.update(self.state, step_schedule, stats.loss)}

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's losses [b, l] in nats, and their sum with the z-loss."""
        batch = batch.to(self.ranks.device)
        if self.context is not None:
            batch = batch.map_tokens(self.context.local_chunk)
        # autocast's cache would keep a bf16 copy of every weight until the forward ends
        with torch.autocast(
            self.ranks.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False
        ):
            losses, log_sums = self.model(batch.tokens, batch.targets, batch.doc_starts)
        total = losses.sum()
        if self.z_loss > 0:
            total = total + self.z_loss * log_sums.square().sum()
        return losses, total

    def _poll_leaderboard(self, *, now: bool = False) -> None:
        """Start evaluation jobs that are due, and log the scores of finished ones."""
        if self.metrics is not None:
            for record in self.jobs.poll(now=now):
                self.metrics.log_scores(record)

    def _record(
        self,
        step_schedule: StepSchedule,
        result: dict[str, Any],
        seconds: float,
        data_wait_seconds: float,
    ) -> dict[str, Any]:
        """Return the step's line of metrics.jsonl without rates; losses in nats per token."""
        stats: StepStats = result["stats"]
        nats, tokens = stats.sums
        rows = [row for row in zip(self.plan.sources, nats, tokens, strict=True) if row[2]]
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": stats.loss,
            "source_loss": {name: n / t for name, n, t in rows},
            "source_tokens": {name: int(t) for name, _, t in rows},
            "grad_norm": result["grad_norm"],
            "skipped": result["skipped"],
            "lr": step_schedule.lr,
            "batch": step_schedule.batch,
            "seq_len": step_schedule.seq_len,
            "stage": step_schedule.stage,
            "memory_gib": peak_memory_gib(self.ranks.device),
            "data_wait_seconds": data_wait_seconds,
            "step_seconds": seconds,
        }
