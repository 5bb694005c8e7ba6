"""Build the trainer from the config and resume from the newest checkpoint that verifies."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from core.errors import InputError
from core.units import short
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import Manifest
from data.stream.mixture import Plan
from eval.heldout import Validation
from eval.leaderboard.jobs import SuiteJobs
from model.flops import parameter_count, train_flops_per_token
from model.kernels import REFERENCE, Kernels, MissingBackend, identity, load, skipped_kernels
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
)
from train.engines.build import build_engine
from train.metrics.console import LOG_COLUMNS
from train.metrics.records import JsonLines, read_scores, restore
from train.metrics.scores import collect_command
from train.metrics.sinks import Metrics
from train.metrics.throughput import Throughput
from train.phases import Phases
from train.record.changes import join
from train.record.history import as_table, to_plain, write_record
from train.record.origin import Origin, find_origin, load_initial_weights, resume
from train.resilience.agreement import check_agreement, check_same_checkpoint
from train.resilience.datacheck import DataCheck
from train.resilience.failure_policy import FailurePolicy
from train.resilience.incidents import Incidents, Starts, sync_records
from train.resilience.replicas import ReplicaCheck
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog
from train.schedule import Schedule
from train.trainer import Trainer

logger = logging.getLogger(__name__)


def build_trainer(
    config: RunConfig,
    manifests: dict[str, Manifest],
    ranks: Ranks,
    code: dict[str, Any],
    watchdog: Watchdog,
    stop_request: StopRequest,
) -> Trainer:
    """Build one rank's trainer; `code` is the version of the code, for the run's record.

    Raises InputError, on every rank, when data, kernels or checkpoints do not fit the config.
    """
    record = {"code": code, **to_plain(asdict(config))}
    datacheck = DataCheck(config.data, manifests, ranks)
    datacheck.start(config.health.verify_shards, watchdog.beat)
    plan = compile_plan(config.data, manifests)
    tokenizer_hash = next(iter(manifests.values())).tokenizer_sha256  # of all sources
    schedule = Schedule(config.schedule, config.optim.lr, config.data)
    phases = Phases(watchdog.enter_phase)
    with errors_on_all_ranks():
        kernels = load_kernels(config.compute, ranks.device.type)
    agree_on_build(kernels, ranks.device.type, plan.hash_at(schedule.total))
    model = build_rank_model(config, kernels, ranks)
    context = context_ranks() if ranks.cp_size > 1 else None
    model.set_context(context)
    checkpoints = build_checkpoints(config, ranks, schedule.stage_ends, watchdog)
    origin = find_origin(config, record, plan, checkpoints, ranks)
    initial = load_initial_weights(model, config, ranks) if origin is None else None
    if config.compute.compile:
        model.compile_blocks()
    engine = build_engine(model, config.optim, config.parallel, config.compute.precision, ranks)
    shape = asdict(config.model)
    state = TrainState(0, 0, 0, plan.hash_at(0), shape, config=record, tokenizer=tokenizer_hash)
    if origin is not None:
        check_same_checkpoint(origin.checkpoint)
        state = resume(checkpoints, origin, engine, state)
    replica_check = ReplicaCheck(model, engine, config.optim, ranks)
    failure_policy = FailurePolicy(
        config.health, ranks, engine, replica_check, checkpoints, phases, watchdog
    )
    failure_policy.spike_detector.load(state.health)
    if state.tokens < schedule.total:
        record_start(config, record, state, origin, initial, ranks, watchdog.incidents)
    watchdog.beat()
    loader = Loader(plan, manifests)
    micro_batch_tokens = config.parallel.micro_batch_tokens
    batches = Batches(loader, schedule, ranks, micro_batch_tokens, engine.needs_equal_micro_batches)
    jobs = build_leaderboard_jobs(config, schedule)
    log_run_summary(config, plan, kernels, ranks, state)
    metrics = None
    with errors_on_all_ranks():
        if ranks.is_first:
            metrics = open_metrics(config, record, ranks, state, checkpoints, watchdog.incidents)
        if metrics is not None:
            jobs.mark_reported(read_scores(metrics.file.path))
    return Trainer(
        ranks=ranks,
        schedule=schedule,
        plan=plan,
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
        has_initial_weights=initial is not None,
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


def agree_on_build(kernels: Kernels, device: str, plan_hash: str) -> None:
    """Raise InputError, on every rank, if ranks have other kernels or another order of the data."""
    skipped = "; ".join(skipped_kernels(kernels, device)) or "none"
    check_agreement(
        {f"kernels' {key}": value for key, value in identity(kernels, device).items()},
        f"mend its kernels, or set compute.kernels to some that all ranks have; skipped: {skipped}",
    )
    check_agreement({"the data plan's hash": plan_hash})


def build_checkpoints(
    config: RunConfig, ranks: Ranks, stage_ends: frozenset[int], watchdog: Watchdog
) -> CheckpointManager:
    """Build the checkpoints of the run."""
    return CheckpointManager(
        config.run.files.checkpoints, config.checkpoint, ranks, stage_ends, watchdog.beat
    )


def sync_and_return_unwritten(
    folder: Path, metrics: JsonLines, on_sync: Callable[[], object]
) -> list[str]:
    """Sync the run's records; return the lines of metrics.jsonl that have no room on the disk."""
    unwritten = metrics.unwritten()
    sync_records(folder, on_sync)
    return unwritten


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


def record_start(
    config: RunConfig,
    record: dict[str, Any],
    state: TrainState,
    origin: Origin | None,
    initial: str | None,
    ranks: Ranks,
    incidents: Incidents,
) -> None:
    """Count this start, write config.yaml with its entry; log changed settings and loaded weights.

    Raises InputError, on every rank, after too many starts without progress and for a damaged
    config.yaml.
    """
    with errors_on_all_ranks():
        if ranks.is_first:
            starts = Starts(config.run.folder, config.health.max_starts)
            if error := starts.count(state.tokens, incidents):
                raise InputError(error)
            write_record(config.run.files.config, record, state, origin, initial, ranks.world_size)
    if not ranks.is_first:
        return
    if initial is not None:
        logger.info(f"initial weights: {initial}")
    if origin is None:
        return
    if others := [change for change in origin.changes if change not in origin.accepted]:
        logger.info(fill(f"other settings since the checkpoint: {join(others)}", LOG_COLUMNS))
    if not (origin.is_branch or origin.accepted):
        return
    kind, text = "changed settings", f"from {state.tokens:,} tokens on"
    if origin.is_branch:
        kind, text = "branch", f"continues {origin.checkpoint}, {state.tokens:,} tokens"
    if origin.accepted:
        text += f": {join(origin.accepted)}"
    incidents.log(kind, text, tokens=state.tokens, changes=as_table(origin.accepted))


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
    config: RunConfig,
    record: dict[str, Any],
    ranks: Ranks,
    state: TrainState,
    checkpoints: CheckpointManager,
    incidents: Incidents,
) -> Metrics | None:
    """The sinks of the run's numbers, which continue from its state; None if it is complete."""
    if state.unwritten:
        restore(config.run.files.metrics, state.unwritten, state.tokens)
    if state.tokens == config.tokens:
        return None
    peak = peak_flops(config.cluster, config.compute.precision, ranks.device)
    if peak is None and ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
        logger.info(f"no MFU: the peak of {name} is not known; set cluster.peak_tflops")
    metrics = Metrics(
        config.run.folder,
        config.run.name,
        config.metrics,
        record,
        Throughput(ranks.world_size, train_flops_per_token(config.model), peak),
        tokens=state.tokens,
        total=config.tokens,
        report=lambda text: incidents.log("damaged record", text),
    )
    checkpoints.writer.before_commit = partial(
        sync_and_return_unwritten, config.run.folder, metrics.file
    )
    return metrics


def log_run_summary(
    config: RunConfig, plan: Plan, kernels: Kernels, ranks: Ranks, state: TrainState
) -> None:
    """Log the run's size, layout and kernels on the first rank, before it starts."""
    if not ranks.is_first:
        return
    logger.info(
        f"run {config.run.name}: {short(parameter_count(config.model))} parameters, "
        f"{short(config.tokens)} tokens, {ranks.world_size} ranks on {ranks.device.type} "
        f"(DP {ranks.dp_size}, CP {ranks.cp_size}, TP {ranks.tp_size}), kernels {kernels.name}"
    )
    if config.run.minutes is not None:
        batch, seq_len = config.schedule.batch_end_sequences, config.data.stages[0].seq_len
        logger.info(
            f"sized for {config.run.minutes:g} minutes at {config.run.flops_per_second:.0e} FLOPS: "
            f"{config.model.n_layer} layers of {config.model.d_model}, about "
            f"{config.tokens // (batch * seq_len):,} updates of {batch} x {seq_len} tokens, lr "
            f"{config.optim.lr:g}"
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
