"""Build the trainer from the config and resume from the newest checkpoint that verifies."""

import logging
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from core.errors import InputError
from core.run import Run
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import Manifest
from data.stream.mixture import Plan
from eval.heldout import Validation
from eval.leaderboard.jobs import SuiteJobs
from model.flops import parameter_count, train_flops_per_token
from model.hf import load_hf_weights
from model.kernels import REFERENCE, Kernels, MissingBackend, load, skipped_kernels
from model.mamba import FalconMamba
from model.parallel.build import build_model
from train.batches import Batches
from train.checkpoint.manager import CheckpointManager, TrainState
from train.config import Compute, Precision, RunConfig
from train.device import peak_flops
from train.distributed import (
    Ranks,
    context_ranks,
    data_parallel_group,
    errors_on_all_ranks,
    raise_on_all_ranks,
)
from train.engines.build import build_engine
from train.engines.protocol import Engine
from train.metrics.console import LOG_COLUMNS
from train.metrics.records import read_scores, short
from train.metrics.scores import collect_command
from train.metrics.sinks import Metrics
from train.metrics.throughput import Throughput
from train.phases import Phases
from train.resilience.datacheck import DataCheck
from train.resilience.failure_policy import FailurePolicy
from train.resilience.incidents import Incidents, Starts
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog
from train.schedule import Schedule
from train.trainer import Trainer

logger = logging.getLogger(__name__)


def build_trainer(
    config: RunConfig,
    manifests: dict[str, Manifest],
    ranks: Ranks,
    record: dict[str, Any],
    watchdog: Watchdog,
    stop_request: StopRequest,
) -> Trainer:
    """Build one rank's trainer; `record` is the config for trackers.

    Raises InputError, on every rank, when data, kernels or checkpoints do not fit the config.
    """
    datacheck = DataCheck(config.data, manifests, ranks)
    datacheck.start(config.health.verify_shards)
    plan = compile_plan(config.data, manifests)
    schedule = Schedule(config.schedule, config.optim.lr, config.data)
    phases = Phases(watchdog.enter_phase)
    with errors_on_all_ranks():
        kernels = load_kernels(config.compute, ranks.device.type)
    model = build_rank_model(config, kernels, ranks)
    context = context_ranks() if ranks.cp_size > 1 else None
    model.set_context(context)
    checkpoints = CheckpointManager(
        config.run.files.checkpoints, config.checkpoint, ranks, schedule.stage_ends
    )
    checkpoint = checkpoints.find_latest()
    with errors_on_all_ranks():
        if checkpoint is None:
            load_initial_weights(model, config.run, ranks.tp_rank, ranks.tp_size)
    if config.compute.compile:
        model.compile_blocks()
    engine = build_engine(model, config.optim, config.parallel, config.compute.precision, ranks)
    state = TrainState(0, 0, 0, plan.hash, asdict(config.model))
    if checkpoint is not None:
        state = resume(checkpoints, checkpoint, engine, expected=state)
    failure_policy = FailurePolicy(
        config.health, ranks, model, engine, checkpoints, phases, watchdog
    )
    failure_policy.spike_detector.load(state.health)
    if state.tokens < schedule.total:
        count_start(config, state, ranks, watchdog.incidents)
    loader = Loader(plan, manifests)
    micro_batch_tokens = config.parallel.micro_batch_tokens
    batches = Batches(loader, schedule, ranks, micro_batch_tokens, engine.needs_equal_micro_batches)
    jobs = build_leaderboard_jobs(config, schedule)
    if ranks.is_first:
        log_run_summary(config, plan, kernels, ranks, state)
    metrics = None
    if ranks.is_first and state.tokens < schedule.total:
        metrics = open_metrics(config, record, ranks, state)
        jobs.mark_reported(read_scores(metrics.file.path))
    return Trainer(
        ranks=ranks,
        schedule=schedule,
        sources=list(plan.sources),
        batches=batches,
        model=model,
        context=context,
        engine=engine,
        z_loss=config.optim.z_loss,
        bf16=config.compute.precision is Precision.bf16,
        checkpoints=checkpoints,
        failure_policy=failure_policy,
        datacheck=datacheck,
        validation=build_validation(config, manifests, ranks),
        jobs=jobs,
        metrics=metrics,
        phases=phases,
        stop_request=stop_request,
        state=state,
    )


def load_kernels(config: Compute, device: str) -> Kernels:
    """Load the kernels; InputError when they are missing or torch.compile cannot use them."""
    try:
        kernels = load(config.kernels, device)
    except MissingBackend as error:
        raise InputError(str(error)) from error
    if config.compile and kernels is REFERENCE:  # torch.compile would unroll its loop over tokens
        raise InputError(
            "compute.compile=true cannot compile the reference kernels, a loop over tokens: set "
            "compute.compile=false or other compute.kernels"
        )
    return kernels


def build_rank_model(config: RunConfig, kernels: Kernels, ranks: Ranks) -> FalconMamba:
    """Build this rank's shard of the model, with random weights that depend only on run.seed."""
    return build_model(
        config.model,
        kernels,
        config.run.seed,
        ranks.device,
        tp_rank=ranks.tp_rank,
        tp_size=ranks.tp_size,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.compute.recompute,
    )


def load_initial_weights(model: FalconMamba, run: Run, tp_rank: int, tp_size: int) -> None:
    """Load the weights that run.init_from names, if it is set."""
    if run.init_from is not None:
        try:
            load_hf_weights(model, Path(run.init_from), tp_rank, tp_size)
        except InputError as error:
            raise InputError(f"run.init_from: {error}") from error


def resume(
    checkpoints: CheckpointManager, folder: Path, engine: Engine, expected: TrainState
) -> TrainState:
    """Load a checkpoint; InputError if its model or data plan differs from `expected`."""
    state = checkpoints.load(folder, engine)
    hint = "restore its config or choose another run.name"
    if state.model != expected.model:
        raise InputError(f"{folder} is of another model: {hint}")
    if state.plan != expected.plan:
        raise InputError(
            f"{folder} has another data plan (sources, stages, seed or shards): {hint}"
        )
    return state


def count_start(config: RunConfig, state: TrainState, ranks: Ranks, incidents: Incidents) -> None:
    """Count this start; InputError on every rank after too many starts without progress."""
    error = None
    if ranks.is_first:
        starts = Starts(config.run.folder, config.health.max_starts)
        error = starts.count(state.tokens, incidents)
    raise_on_all_ranks(error)


def build_validation(config: RunConfig, manifests: dict[str, Manifest], ranks: Ranks) -> Validation:
    """Build the validation, whose batches replicas share."""
    return Validation(
        config.data,
        manifests,
        config.validation,
        bf16=config.compute.precision is Precision.bf16,
        rank=ranks.replica_rank,  # the group holds context-parallel ranks too
        world_size=ranks.num_replicas,
        group=data_parallel_group(),
    )


def build_leaderboard_jobs(config: RunConfig, schedule: Schedule) -> SuiteJobs:
    """Build evaluation jobs, always for the last stage end before the decay and the run's end."""
    decay_start = schedule.total - config.schedule.decay_tokens
    before_decay = max(
        (end for end in schedule.stage_ends if end <= decay_start), default=decay_start
    )
    return SuiteJobs(
        config.run,
        config.leaderboard.jobs,
        always={before_decay, schedule.total},
        then=collect_command(config.run.folder),
    )


def open_metrics(
    config: RunConfig, record: dict[str, Any], ranks: Ranks, state: TrainState
) -> Metrics:
    """The sinks of the run's numbers, which continue from its state."""
    peak = peak_flops(config.cluster, config.compute.precision, ranks.device)
    if peak is None and ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
        logger.info(f"no MFU: the peak of {name} is not known; set cluster.peak_tflops")
    return Metrics(
        config.run.folder,
        config.run.name,
        config.metrics,
        record,
        Throughput(ranks.world_size, train_flops_per_token(config.model), peak),
        tokens=state.tokens,
        total=config.tokens,
    )


def log_run_summary(
    config: RunConfig, plan: Plan, kernels: Kernels, ranks: Ranks, state: TrainState
) -> None:
    """Log the run's size, layout and kernels before it starts."""
    logger.info(
        f"run {config.run.name}: {short(parameter_count(config.model))} parameters, "
        f"{short(config.tokens)} tokens, {ranks.world_size} ranks on {ranks.device.type} "
        f"(DP {ranks.dp_size}, CP {ranks.cp_size}, TP {ranks.tp_size}), kernels {kernels.name}"
    )
    epochs = ", ".join(f"{name} {value:.2f}" for name, value in plan.epochs().items())
    logger.info(fill(f"epochs of each source: {epochs}", LOG_COLUMNS))
    if kernels.name == "reference" and ranks.device.type == "cuda":
        logger.warning("the reference kernels are far too slow for a GPU run")
    for line in skipped_kernels(kernels, ranks.device.type):
        logger.info(f"faster kernels are not used: {line}")
    if state.tokens == config.tokens:
        logger.info(f"reused: the run is complete at step {state.step:,}")
    elif state.tokens:
        logger.info(f"continuing from step {state.step:,}, {state.tokens:,} tokens")
