"""What a step may need besides its update: skip, stop, rewind, check of replicas, save."""

import logging
from typing import Any

from torch import nn

from core.errors import InputError
from train.checkpoint.manager import Checkpoints, State
from train.distributed import Ranks
from train.engines.protocol import Engine
from train.phases import LONG_PATIENCE, Phases
from train.resilience.config import HealthConfig
from train.resilience.health import Health, Stragglers, drifting
from train.resilience.watchdog import Watch
from train.schedule import Now
from train.step_stats import Told

logger = logging.getLogger(__name__)


class Guard:
    """Watches over the steps of one rank; all ranks' guards decide alike."""

    def __init__(
        self,
        config: HealthConfig,
        ranks: Ranks,
        model: nn.Module,
        engine: Engine,
        checkpoints: Checkpoints,
        phases: Phases,
        watch: Watch,
    ) -> None:
        self.config, self.ranks, self.phases, self.watch = config, ranks, phases, watch
        self.model, self.engine, self.checkpoints = model, engine, checkpoints
        self.health = Health(config)
        self.stragglers = Stragglers(config.straggler_window_steps, config.straggler_factor)

    def update(self, state: State, now: Now, loss: float) -> dict[str, Any]:
        """Update the weights unless the step does harm; returns the norm, and if it skipped."""
        why = self.health.judge(loss, now.stage)
        if why is None:
            grad_norm, skipped = self.engine.clip_and_step(now.lr)
            why = "its gradient is not finite" if skipped else None
            spiked = False
        else:
            self.engine.skip_step()
            grad_norm, skipped, spiked = float("nan"), True, "spike" in why
        self.health.settle(loss, state.tokens, not skipped, spiked)
        state.updates += not skipped
        if why is not None and self.ranks.first:
            end = state.tokens + now.tokens
            text = f"step {state.step + 1} (tokens {state.tokens:,} to {end:,}): {why}"
            self.watch.incidents.log(
                "skipped update", text, step=state.step + 1, tokens=[state.tokens, end]
            )
        return {"grad_norm": grad_norm, "skipped": skipped}

    def after(self, state: State, before: int, told: Told) -> None:
        """Check the step from token `before` to now; InputError on every rank stops the run."""
        self.phases.enter(state.step, "check")
        if self.health.hopeless is not None:
            raise InputError(
                f"{self.health.hopeless}, up to step {state.step}: lower optim.lr or "
                "optim.clip_norm, or look at the tokens that incidents.jsonl names, and start "
                "from an earlier checkpoint"
            )
        rewound = self.health.lasting and self._rewind(state)
        if state.step % self.config.check_replicas_every_steps == 0:
            self.check_replicas(state.step)
        slow = self.stragglers.add(told.seconds)
        if self.ranks.first:
            for rank, times in slow:
                text = (
                    f"rank {rank} on {self.watch.host(rank)} is {times:.1f} times slower than "
                    "the others"
                )
                self.watch.incidents.log("straggler", text, rank=rank, step=state.step)
        if rewound or told.save or self.checkpoints.due(before, state.tokens):
            self.phases.enter(state.step, "save")
            state.health = self.health.state()
            waited = self.checkpoints.save(state, self.engine)
            logger.info(
                f"checkpoint of step {state.step} is being written; the loop waited {waited:.2f} s"
            )

    def leave(self, state: State) -> None:
        """The last save, which waits until it is on disk."""
        self.phases.enter(state.step, "leave", LONG_PATIENCE)
        state.health = self.health.state()
        self.checkpoints.save_and_wait(state, self.engine)

    def check_replicas(self, step: int) -> None:
        """Raise RuntimeError on every rank when weights drifted; the next start repairs them."""
        if drifted := drifting(self.model, self.engine, self.ranks):
            names = ", ".join(f"rank {rank} on {self.watch.host(rank)}" for rank in drifted)
            text = f"weights of {names} differ from their master copies after step {step}"
            if self.ranks.first:
                self.watch.incidents.log("drift", text, ranks=drifted, step=step)
            raise RuntimeError(text)

    def _rewind(self, state: State) -> bool:
        """Load a checkpoint from before a lasting spike; leave out the data since then."""
        since = self.health.since
        assert since is not None
        self.phases.enter(state.step, "save", LONG_PATIENCE)
        self.checkpoints.flush()
        folder = self.checkpoints.find(before=since)
        if folder is None:
            return False  # the updates go on being skipped, until there are too many
        old = self.checkpoints.load(folder, self.engine)
        rewinds = self.health.rewinds + 1
        self.health.load(
            {**old.health, "rewinds": rewinds, "calm": 0, "skipped": 0, "spikes": 0, "since": None}
        )
        state.updates = old.updates
        if self.ranks.first:
            text = (
                f"the loss has spiked since token {since:,}: weights of {folder.name}, and "
                f"tokens {old.tokens:,} to {state.tokens:,} are left out"
            )
            self.watch.incidents.log(
                "rewind", text, tokens=[old.tokens, state.tokens], number=rewinds
            )
        return True
