"""Config of a small run: two sources, three stages, batch ramp, context change, decay, clipping."""

from dataclasses import replace
from pathlib import Path

from core.run import Run
from eval.config import EvaluationConfig, ValidationConfig
from tests.compose import demo, typed
from tests.corpus import BLOCK, SOURCES, corpus_config
from tests.tiny import TINY
from train.config import (
    CheckpointConfig,
    Cluster,
    DecayShape,
    Device,
    MetricsConfig,
    Optim,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    Train,
)
from train.resilience.config import HealthConfig, VerifyShards


def config(root: Path, name: str, tensor_parallel: int = 1, context_parallel: int = 1) -> RunConfig:
    """43 steps: batches ramp from 1 (a rank has none) to 8, contexts are 16 and 32."""
    base = demo()
    return RunConfig(
        run=Run(name, str(root / name), 0),
        model=TINY,
        data=corpus_config(root / "data"),
        optim=Optim(1e-2, 0.9, 0.95, 1e-8, 0.1, clip_norm=0.8, z_loss=0.0),
        schedule=ScheduleConfig(1e-2 / 256, 200, 600, DecayShape.exponential, 1, 8, 1500, True),
        parallel=replace(
            base.parallel,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            micro_batch_tokens=64,
        ),
        checkpoint=CheckpointConfig(400, 100, None, True, retry_seconds=0.0, max_failures=3),
        health=health(),
        metrics=MetricsConfig(None, False, 60.0),
        compute=base.compute,
        train=Train(ProfileConfig(0, 0, 0, [0])),
        cluster=Cluster(Device.cpu, 1, 1, None, 0.0, 1.0),
        validation=ValidationConfig(1000, 200, 32, 4),
        leaderboard=base.leaderboard,
    )


def evaluation(run: RunConfig) -> EvaluationConfig:
    """Config of the commands of eval/ for a run."""
    demo = typed(EvaluationConfig, "demo")
    return replace(demo, run=run.run, model=run.model, data=run.data)


def overrides(tokens: int) -> list[str]:
    """Overrides that give the demo a tiny model and one stage of the test corpus."""
    curated = "{recipe: curated, input: raw, licence: CC0-1.0, max_epochs: 40, tasks: 1}"
    stage = f"name: only, tokens: {tokens}, seq_len: 16, mixture: {{prose: 1, sums: 1}}"
    return [
        *("model.vocab_size=96", "model.d_model=24", "model.n_layer=2"),
        *("model.d_inner=48", "model.d_state=6", "model.dt_rank=5"),
        *(f"~data.sources.{name}" for name in ("web", "code", "technical", "curated", "math")),
        *(f"+data.sources.{name}={curated}" for name in SOURCES),
        f"data.stages=[{{{stage}}}]",
        f"data.block_tokens={BLOCK}",
        "data.seed=5",
        "data.tokenizer.vocab_size=96",
        "data.tokenizer.train_megabytes=1",
    ]


def health() -> HealthConfig:
    """Health checks at short intervals; the spike window is longer than the run."""
    return HealthConfig(
        max_skipped_updates=10,
        spike_window_updates=128,
        spike_sigmas=6.0,
        spike_patience_updates=3,
        max_rollbacks=2,
        check_replicas_every_steps=5,
        straggler_window_steps=8,
        straggler_factor=2.0,
        hang_seconds=600.0,
        max_starts=5,
        stop_after_seconds=None,
        stop_margin_seconds=0.0,
        verify_shards=VerifyShards.before,
    )
