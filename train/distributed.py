"""Process groups of a rank: setup, teardown, and small collectives on the CPU.

megatron-core's parallel_state owns the groups. The tensor-parallel layers read them from there,
DeepSpeed through Mpu.
"""

import hashlib
import logging
import os
import resource
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from core.errors import InputError
from model.parallel.context import ContextRanks
from train.device import keep_freed_memory

# megatron-core warns of missing optional CUDA packages; DeepSpeed's use of torch at every step
warnings.filterwarnings("ignore", message=".*Apex.*")
warnings.filterwarnings("ignore", message=".*full scope is deprecated.*")
warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
# megatron-core gathers buckets one ahead; its fp32 bucket, which is last, is needed second
warnings.filterwarnings("ignore", message="The next bucket's parameter all-gather.*")
warnings.filterwarnings(
    "ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning
)

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 2048
POLL_SECONDS = 0.02
# sockets of a rank to every other rank, counted on 2, 4 and 6; fewer under tensor parallelism
SOCKETS_PER_RANK = 8
OTHER_OPEN_FILES = 200
RESOLVE_SECONDS = 60.0  # of a name service that is busy when many ranks start
# of a collective; long enough for a rank that verifies a large checkpoint
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the world and in each parallel dimension."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int  # index of its chunk of every sequence
    cp_size: int
    dp_rank: int  # index of its share of the sequences
    dp_size: int
    device: torch.device

    @property
    def num_replicas(self) -> int:
        """Data x context ranks: they hold the same model shard and sum their gradients."""
        return self.dp_size * self.cp_size

    @property
    def replica_rank(self) -> int:
        """This rank's index among the replicas."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's logs, metrics and manifests."""
        return self.rank == 0


@contextmanager
def init_distributed(
    device: str, tensor_parallel: int, context_parallel: int = 1
) -> Iterator[Ranks]:
    """Connect all ranks and build their parallel groups, both destroyed at exit."""
    with connect(device), parallel_groups(device, tensor_parallel, context_parallel) as ranks:
        yield ranks


@contextmanager
def connect(device: str) -> Iterator[None]:
    """Connect this rank with all others, from the launcher's environment; disconnect at exit.

    Without a launcher the world is one rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    raise_open_file_limit(world_size)
    local_rank = os.environ.get("LOCAL_RANK")
    if device == "cuda":
        torch.cuda.set_device(int(local_rank or 0))
    else:
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        resolve_master_address()
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            backend,
            store=per_start_store(store, rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    try:
        yield
        dist.barrier()  # no rank exits while another still sends to it
    finally:
        dist.destroy_process_group()
        if local_rank is None:  # with it transformers would wait for a launcher's other ranks
            os.environ.pop("LOCAL_RANK", None)


def resolve_master_address() -> None:
    """Connect to this machine where its own name, which torchrun sets, does not resolve.

    Raises InputError if the name of another machine has not resolved within RESOLVE_SECONDS.
    """
    address = os.environ.get("MASTER_ADDR", "")
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    end = time.monotonic() + (0.0 if is_alone else RESOLVE_SECONDS)
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if is_alone:
                os.environ["MASTER_ADDR"] = "localhost"
                logger.warning(f"the name {address} does not resolve ({error}): using localhost")
                return
            if time.monotonic() > end:
                raise InputError(
                    f"MASTER_ADDR {address} does not resolve ({error}): mend the name service, or "
                    "give its address (torchrun: --local-addr ADDRESS on that machine)"
                ) from error
        time.sleep(POLL_SECONDS)


def raise_open_file_limit(world_size: int) -> None:
    """Raise this process's soft limit of open files to the hard limit.

    gloo connects a rank to all others in each of its groups: at 256 ranks this takes twice the
    usual limit of 1,024. Raises InputError when the hard limit is too low.
    """
    needed = SOCKETS_PER_RANK * world_size + OTHER_OPEN_FILES
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise InputError(
            f"{world_size} ranks need {needed:,} open files each, {limit:,} are allowed: raise "
            "nofile in /etc/security/limits.conf and LimitNOFILE of slurmd"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def per_start_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Return a PrefixStore of the launcher's store whose prefix is new at every start.

    torchrun keeps one store over restarts, and since torch 2.5 workers get no prefix per attempt
    (pytorch PR 135957): a restarted rank would read addresses of dead ranks. The restart count is
    no usable prefix, since the agents of several nodes count separately (issue 135712). So rank 0
    chooses the prefix. Every other rank asks for it under a random name, so that rank 0's answer to
    a rank of an earlier start is never read.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"request/{rank}", name)
        prefix = store.get(f"prefix/{name}").decode()
        store.set(f"received/{prefix}/{rank}", "")
        return dist.PrefixStore(prefix, store)
    waiting = list(range(1, world_size))
    while waiting:
        for other in waiting:
            store.set(f"prefix/{store.get(f'request/{other}').decode()}", name)
        time.sleep(POLL_SECONDS)
        waiting = [other for other in waiting if not store.check([f"received/{name}/{other}"])]
    return dist.PrefixStore(name, store)


@contextmanager
def parallel_groups(device: str, tensor_parallel: int, context_parallel: int) -> Iterator[Ranks]:
    """Build megatron-core's process groups of connected ranks; destroy them at exit.

    Raises InputError where the layout does not divide the launcher's ranks.
    """
    from megatron.core import parallel_state

    world_size = dist.get_world_size()
    if world_size % (tensor_parallel * context_parallel):
        raise InputError(
            f"parallel.tensor_parallel {tensor_parallel} x parallel.context_parallel "
            f"{context_parallel} does not divide the launcher's {world_size} ranks"
        )
    parallel_state.initialize_model_parallel(
        tensor_parallel, context_parallel_size=context_parallel, create_gloo_process_groups=False
    )
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world_size=world_size,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=tensor_parallel,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=context_parallel,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            device=(
                torch.device(device, torch.cuda.current_device())
                if device == "cuda"
                else torch.device("cpu")
            ),
        )
        dist.barrier()  # no group ends while another rank still sends in it
    finally:
        parallel_state.destroy_model_parallel()


class Mpu:
    """megatron-core's process groups by the names that DeepSpeed calls.

    DeepSpeed's "model parallel" is tensor parallel. Context-parallel ranks sum gradients as
    data-parallel ranks do, so to DeepSpeed they are data-parallel.
    """

    REPLICAS = ("get_data_parallel_group", "get_data_parallel_rank", "get_data_parallel_world_size")

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        translated = {
            "get_model_parallel_group": "get_tensor_model_parallel_group",
            "get_model_parallel_rank": "get_tensor_model_parallel_rank",
            "get_model_parallel_world_size": "get_tensor_model_parallel_world_size",
        }
        # DeepSpeed enables its Ulysses sequence parallelism if this exists
        if name == "initialize_sequence_parallel":
            raise AttributeError(name)
        function = getattr(parallel_state, translated.get(name, name))
        return partial(function, with_context_parallel=True) if name in self.REPLICAS else function


def data_parallel_group() -> Any:
    """Group of the ranks that hold the same model shard, context-parallel ranks included."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_parallel_group() -> Any:
    """Group of the ranks that together hold one copy of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def context_ranks() -> ContextRanks:
    """Ranks that hold the chunks of this rank's sequences."""
    from megatron.core import parallel_state

    return ContextRanks(parallel_state.get_context_parallel_group())


def raise_on_all_ranks(error: str | None) -> None:
    """Raise InputError on every rank if any rank has an error message.

    A collective: without it, other ranks would wait for the rank that raised.
    """
    message = (error or "").encode()[:MESSAGE_BYTES]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(message)]))
    failed_ranks = [rank for rank, size in enumerate(sizes) if size]
    if not failed_ranks:
        return
    content = torch.frombuffer(bytearray(message.ljust(MESSAGE_BYTES)), dtype=torch.uint8)
    dist.broadcast(content, src=failed_ranks[0])
    raise InputError(bytes(content.tolist()).decode(errors="replace").strip())


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise any rank's InputError on every rank; for a body without collectives."""
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    raise_on_all_ranks(message)


def gather_hashes(text: str) -> list[bytes]:
    """SHA-256 of every rank's text, by rank. A collective."""
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, digest)
    return [bytes(each.tolist()) for each in digests]


def broadcast_text(text: str, source: int = 0) -> str:
    """Return the text of rank `source`, which must not be empty, on every rank."""
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=source)
    if dist.get_rank() != source:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=source)
    return content.numpy().tobytes().decode()
