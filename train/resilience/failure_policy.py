"""Decide after each step: skip the update, roll back, abort, check replicas, save."""

import logging
import os
from typing import Any

from core.errors import USER_ERROR, InputError
from train.checkpoint.manager import CheckpointManager, TrainState
from train.distributed import Ranks
from train.engines.protocol import Engine
from train.phases import LONG_PATIENCE, Phases
from train.resilience.config import HealthConfig
from train.resilience.health import SpikeDetector, StragglerDetector
from train.resilience.incidents import FINISHED, Outcome
from train.resilience.replicas import ReplicaCheck
from train.resilience.watchdog import Watchdog
from train.schedule import StepSchedule
from train.step_stats import StepStats

logger = logging.getLogger(__name__)
REMEDY = "lower optim.lr or clip_norm and start from an earlier checkpoint"


class FailurePolicy:
    """What one rank does about failing steps; it decides alike on all ranks."""

    def __init__(
        self,
        config: HealthConfig,
        ranks: Ranks,
        engine: Engine,
        replica_check: ReplicaCheck,
        checkpoints: CheckpointManager,
        phases: Phases,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.engine = engine
        self.replica_check = replica_check
        self.checkpoints = checkpoints
        self.phases = phases
        self.watchdog = watchdog
        self.is_first_step = True  # of this start, which checks what was loaded
        self.spike_detector = SpikeDetector(config)
        self.straggler_detector = StragglerDetector(
            config.straggler_window_steps,
            config.straggler_factor,
            one_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == ranks.world_size,
        )

    def update(self, state: TrainState, step_schedule: StepSchedule, loss: float) -> dict[str, Any]:
        """Update the weights, or skip the update; returns `grad_norm` and `skipped`.

        Raises RuntimeError on every rank if replicas differ; the next start repairs them.
        """
        is_checked = self.is_first_step or state.step % self.config.check_replicas_every_steps == 0
        self.is_first_step = False
        if is_checked:
            self.check_weights(state.step)
        skip_reason = self.spike_detector.check(loss, step_schedule.stage)
        if skip_reason is None:
            if is_checked:
                grad_norm, skipped = self._checked_update(state, step_schedule.lr, loss)
            else:
                grad_norm, skipped = self.engine.clip_and_step(step_schedule.lr)
            skip_reason = "the gradient is not finite" if skipped else None
            spiked = False
        else:
            self.engine.skip_step()
            grad_norm = float("nan")
            skipped = True
            spiked = "spike" in skip_reason
        self.spike_detector.update(loss, state.tokens, not skipped, spiked)
        state.updates += not skipped
        if skip_reason is not None and self.ranks.is_first:
            end = state.tokens + step_schedule.tokens
            text = f"step {state.step + 1:,} (tokens {state.tokens:,} to {end:,}): {skip_reason}"
            self.watchdog.incidents.log(
                "skipped update", text, step=state.step + 1, tokens=[state.tokens, end]
            )
        return {"grad_norm": grad_norm, "skipped": skipped}

    def after_step(self, state: TrainState, start: int, stats: StepStats) -> None:
        """Check and, if due, save after the step that began at token `start`.

        Raises InputError on every rank if the run must stop.
        """
        self.phases.enter(state.step, "check")
        if self.spike_detector.should_abort is not None:
            raise InputError(
                f"{self.spike_detector.should_abort} (step {state.step:,}): {REMEDY}; "
                "incidents.jsonl lists the tokens"
            )
        rolled_back = self.spike_detector.should_roll_back and self._roll_back(state)
        stragglers = self.straggler_detector.add(stats.compute_seconds)
        if self.ranks.is_first:
            for rank, factor in stragglers:
                host = self.watchdog.host(rank)
                text = f"rank {rank} on {host} is {factor:.1f} times slower than the other ranks"
                self.watchdog.incidents.log("straggler", text, rank=rank, step=state.step)
        if rolled_back or stats.save or self.checkpoints.is_due(start, state.tokens):
            self.phases.enter(state.step, "save", LONG_PATIENCE)
            state.health = self.spike_detector.state()
            seconds = self.checkpoints.save(state, self.engine)
            logger.info(
                f"saving step {state.step:,} in the background; the loop waited {seconds:.2f} s"
            )

    def final_save(self, state: TrainState) -> None:
        """Save before the run ends, and wait until the checkpoint is on disk."""
        self.phases.enter(state.step, "exit", LONG_PATIENCE)
        state.health = self.spike_detector.state()
        self.checkpoints.save_and_wait(state, self.engine)

    def final_outcome(self, state: TrainState) -> Outcome:
        """The outcome of a run at its last token.

        It has failed if most of its updates were skipped, or the last spike_patience_updates.
        """
        steps = f"{state.tokens:,} tokens in {state.step:,} steps"
        skipped = state.step - state.updates  # those of a rollback too
        in_a_row = self.spike_detector.skipped
        if skipped > state.updates:
            what = "all" if not state.updates else f"{skipped:,} of {state.step:,}"
        elif in_a_row >= self.config.spike_patience_updates:
            what = f"the last {in_a_row:,}"
        else:
            note = f", {skipped:,} without an update" if skipped else ""
            return Outcome(FINISHED, f"finished: {steps}{note}")
        reason = f"{what} updates were skipped in {steps}: incidents.jsonl says why; {REMEDY}"
        return Outcome(USER_ERROR, reason)

    def check_weights(self, step: int) -> None:
        """Raise RuntimeError on every rank if the weights after `step` steps differ."""
        what = f"weights differ from their master weights or replicas after step {step:,}"
        self._raise_if(self.replica_check.diverged_weights(), step, what)

    def _checked_update(self, state: TrainState, lr: float, loss: float) -> tuple[float, bool]:
        """Update; raise RuntimeError on every rank where ranks update otherwise."""
        with self.replica_check.sampling(state.step) as rows:
            grad_norm, skipped = self.engine.clip_and_step(lr)
        facts = [loss, grad_norm, float(skipped), float(state.step), float(state.tokens)]
        diverged = self.replica_check.diverged_updates(rows, lr, state.updates + 1, facts)
        self._raise_if(diverged, state.step, f"update {state.updates + 1:,} is not that of others")
        return grad_norm, skipped

    def _raise_if(self, diverged: list[int], step: int, what: str) -> None:
        if not diverged:
            return
        names = ", ".join(f"rank {rank} on {self.watchdog.host(rank)}" for rank in diverged)
        text = f"{names}: {what}"
        if self.ranks.is_first:
            self.watchdog.incidents.log("drift", text, ranks=diverged, step=step)
        raise RuntimeError(text)

    def _roll_back(self, state: TrainState) -> bool:
        """Load the checkpoint before a lasting spike and skip the data since; returns if it did."""
        since = self.spike_detector.since
        assert since is not None
        self.phases.enter(state.step, "save", LONG_PATIENCE)
        self.checkpoints.wait()
        folder = self.checkpoints.find_latest(max_tokens=since)
        if folder is None:
            return False  # updates stay skipped until max_skipped_updates
        old = self.checkpoints.load(folder, self.engine)
        rollbacks = self.spike_detector.rollbacks + 1
        self.spike_detector.load(old.health)
        self.spike_detector.start_after_rollback(rollbacks)
        state.updates = old.updates
        if self.ranks.is_first:
            text = (
                f"a loss spike lasts: loaded {folder.name}, skipped tokens {old.tokens:,} to "
                f"{state.tokens:,}"
            )
            tokens = [old.tokens, state.tokens]
            self.watchdog.incidents.log(
                "rollback", text, tokens=tokens, number=rollbacks, since=since
            )
        return True
