"""What a step may need besides its update: skip, stop, rewind, check of replicas, save."""

import logging
import os
from typing import Any

from torch import nn

from core.errors import InputError
from train.checkpoint.manager import CheckpointManager, TrainState
from train.distributed import Ranks
from train.engines.protocol import Engine
from train.phases import LONG_PATIENCE, Phases
from train.resilience.config import HealthConfig
from train.resilience.health import SpikeDetector, Stragglers, drifting
from train.resilience.watchdog import Watchdog
from train.schedule import StepSchedule
from train.step_stats import StepStats

logger = logging.getLogger(__name__)


class FailurePolicy:
    """Watches over the steps of one rank; all ranks' guards decide alike."""

    def __init__(
        self,
        config: HealthConfig,
        ranks: Ranks,
        model: nn.Module,
        engine: Engine,
        checkpoints: CheckpointManager,
        phases: Phases,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.ranks, self.phases, self.watchdog = config, ranks, phases, watchdog
        self.model, self.engine, self.checkpoints = model, engine, checkpoints
        self.spike_detector = SpikeDetector(config)
        self.stragglers = Stragglers(
            config.straggler_window_steps,
            config.straggler_factor,
            one_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == ranks.world_size,
        )

    def update(self, state: TrainState, step_schedule: StepSchedule, loss: float) -> dict[str, Any]:
        """Update the weights unless the step does harm; returns the norm, and if it skipped."""
        why = self.spike_detector.check(loss, step_schedule.stage)
        if why is None:
            grad_norm, skipped = self.engine.clip_and_step(step_schedule.lr)
            why = "the gradient is not finite" if skipped else None
            spiked = False
        else:
            self.engine.skip_step()
            grad_norm, skipped, spiked = float("nan"), True, "spike" in why
        self.spike_detector.update(loss, state.tokens, not skipped, spiked)
        state.updates += not skipped
        if why is not None and self.ranks.is_first:
            end = state.tokens + step_schedule.tokens
            text = f"step {state.step + 1:,} (tokens {state.tokens:,} to {end:,}): {why}"
            self.watchdog.incidents.log(
                "skipped update", text, step=state.step + 1, tokens=[state.tokens, end]
            )
        return {"grad_norm": grad_norm, "skipped": skipped}

    def after(self, state: TrainState, before: int, stats: StepStats) -> None:
        """Check the step from token `before` to now; InputError on every rank stops the run."""
        self.phases.enter(state.step, "check")
        if self.spike_detector.should_abort is not None:
            raise InputError(
                f"{self.spike_detector.should_abort} (step {state.step:,}): lower optim.lr or "
                "clip_norm and start from an earlier checkpoint; incidents.jsonl lists the tokens"
            )
        rolled_back = self.spike_detector.should_roll_back and self._roll_back(state)
        if state.step % self.config.check_replicas_every_steps == 0:
            self.check_replicas(state.step)
        slow = self.stragglers.add(stats.compute_seconds)
        if self.ranks.is_first:
            for rank, times in slow:
                host = self.watchdog.host(rank)
                text = f"rank {rank} on {host} is {times:.1f} times slower than the other ranks"
                self.watchdog.incidents.log("straggler", text, rank=rank, step=state.step)
        if rolled_back or stats.save or self.checkpoints.is_due(before, state.tokens):
            self.phases.enter(state.step, "save")
            state.health = self.spike_detector.state()
            waited = self.checkpoints.save(state, self.engine)
            logger.info(
                f"saving step {state.step:,} in the background; the loop waited {waited:.2f} s"
            )

    def final_save(self, state: TrainState) -> None:
        """The last save, which waits until it is on disk."""
        self.phases.enter(state.step, "exit", LONG_PATIENCE)
        state.health = self.spike_detector.state()
        self.checkpoints.save_and_wait(state, self.engine)

    def check_replicas(self, step: int) -> None:
        """Raise RuntimeError on every rank when weights drifted; the next start repairs them."""
        if drifted := drifting(self.model, self.engine, self.ranks):
            names = ", ".join(f"rank {rank} on {self.watchdog.host(rank)}" for rank in drifted)
            text = f"weights of {names} differ from their master copies after step {step:,}"
            if self.ranks.is_first:
                self.watchdog.incidents.log("drift", text, ranks=drifted, step=step)
            raise RuntimeError(text)

    def _roll_back(self, state: TrainState) -> bool:
        """Load a checkpoint from before a lasting spike; leave out the data since then."""
        since = self.spike_detector.since
        assert since is not None
        self.phases.enter(state.step, "save", LONG_PATIENCE)
        self.checkpoints.wait()
        folder = self.checkpoints.find_latest(max_tokens=since)
        if folder is None:
            return False  # the updates go on being skipped, until there are too many
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
