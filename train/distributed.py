"""Process groups, device and teardown of one rank, and the view of them that DeepSpeed wants.

megatron-core's parallel_state owns the groups; it feeds the tensor-parallel layers and, through
Mpu, DeepSpeed.
"""

import os
import resource
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
from train.device import keep_freed

# said by megatron-core of optional CUDA packages, and at every step by DeepSpeed's use of torch
warnings.filterwarnings("ignore", message=".*Apex.*")
warnings.filterwarnings("ignore", message=".*full scope is deprecated.*")
warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
# by megatron-core of its fp32 bucket, which is asked for second and stands last; all others are
# gathered one ahead
warnings.filterwarnings("ignore", message="The next bucket's parameter all-gather.*")
warnings.filterwarnings(
    "ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning
)

MESSAGE_BYTES = 2048
POLL_SECONDS = 0.02  # between two looks for ranks that have not come
# of a rank to each other one, counted on 2, 4 and 6; fewer under tensor parallelism
SOCKETS, OTHER_FILES = (8, 200)
# of a collective; long enough for a rank that verifies a large checkpoint
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int  # which piece of its sequences this rank holds
    cp_size: int
    dp_rank: int  # which sequences
    dp_size: int
    device: torch.device

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model, and sum their gradients."""
        return self.dp_size * self.cp_size

    @property
    def replica(self) -> int:
        """This rank's number among them."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0


@contextmanager
def init_distributed(
    device: str, tensor_parallel: int, context_parallel: int = 1
) -> Iterator[Ranks]:
    """Join the world in the launcher's environment (one rank without); leave it at the end."""
    from megatron.core import parallel_state

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (tensor_parallel * context_parallel):
        raise InputError(
            f"parallel.tensor_parallel {tensor_parallel} times parallel.context_parallel "
            f"{context_parallel} does not divide the {world} ranks of the launcher"
        )
    allow_sockets(world)
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed asks for it
    if device == "cuda":
        torch.cuda.set_device(local)
    else:
        keep_freed()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            backend,
            store=attempt_store(store, rank, world),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_model_parallel(
            torch.device(device, local) if device == "cuda" else torch.device("cpu"),
            tensor_parallel,
            context_parallel,
        )
        dist.barrier()  # nobody leaves while another still speaks to it
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def allow_sockets(world: int) -> None:
    """Raise this process's limit of open files to what it may; InputError where `world` ranks need
    more.

    gloo joins each rank with all others in every group that it is in: at 256 ranks twice the usual
    limit of 1,024.
    """
    needed = SOCKETS * world + OTHER_FILES
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < needed:
        raise InputError(
            f"{world} ranks need {needed:,} open files each, this machine allows {most:,}: raise "
            "its hard limit (nofile in /etc/security/limits.conf, LimitNOFILE of slurmd's "
            "service)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def attempt_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of a launcher's store that this start alone reads and writes.

    torchrun's agent keeps one store over its restarts, and since torch 2.5 workers get no prefix
    per attempt (pytorch PR 135957): a restarted rank would find addresses of ranks that are dead. A
    count of restarts is no such prefix, for agents of several nodes count apart (issue 135712). So
    rank 0 names the part, and tells it under a name that each other rank makes up; what a rank of
    an earlier start has asked, nobody comes to read.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", name)
        part = store.get(f"told/{name}").decode()
        store.set(f"met/{part}/{rank}", "")
        return dist.PrefixStore(part, store)
    missing = list(range(1, world))
    while missing:
        for other in missing:
            store.set(f"told/{store.get(f'asks/{other}').decode()}", name)
        time.sleep(POLL_SECONDS)
        missing = [other for other in missing if not store.check([f"met/{name}/{other}"])]
    return dist.PrefixStore(name, store)


def init_model_parallel(device: torch.device, tensor_parallel: int, context_parallel: int) -> Ranks:
    """Build megatron-core's groups in this process's world; returns its place in them."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_parallel, context_parallel_size=context_parallel, create_gloo_process_groups=False
    )
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tensor_parallel,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=context_parallel,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
    )


class Mpu:
    """The names under which DeepSpeed asks for megatron-core's groups; "model parallel" means
    tensor parallel there.

    Ranks that hold pieces of the same sequences sum gradients like any others: to DeepSpeed they
    are data-parallel.
    """

    REPLICAS = ("get_data_parallel_group", "get_data_parallel_rank", "get_data_parallel_world_size")

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        translated = {
            "get_model_parallel_group": "get_tensor_model_parallel_group",
            "get_model_parallel_rank": "get_tensor_model_parallel_rank",
            "get_model_parallel_world_size": "get_tensor_model_parallel_world_size",
        }
        # DeepSpeed turns its Ulysses sequence parallelism on when it finds this one
        if name == "initialize_sequence_parallel":
            raise AttributeError(name)
        function = getattr(parallel_state, translated.get(name, name))
        return partial(function, with_context_parallel=True) if name in self.REPLICAS else function


def data_parallel_group() -> Any:
    """The ranks that hold the same part of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_parallel_group() -> Any:
    """The ranks that hold the other parts of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def context_ranks() -> ContextRanks:
    """The ranks that hold the other pieces of this rank's sequences."""
    from megatron.core import parallel_state

    return ContextRanks(parallel_state.get_context_parallel_group())


def raise_on_all_ranks(why: str | None) -> None:
    """Raise any rank's InputError on every rank, so that none waits for a rank that has left."""
    message = (why or "").encode()[:MESSAGE_BYTES]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(message)]))
    speakers = [rank for rank, size in enumerate(sizes) if size]
    if not speakers:
        return
    said = torch.frombuffer(bytearray(message.ljust(MESSAGE_BYTES)), dtype=torch.uint8)
    dist.broadcast(said, src=speakers[0])
    raise InputError(bytes(said.tolist()).decode(errors="replace").strip())


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise an InputError of any rank on every rank; for a body without collectives."""
    why = None
    try:
        yield
    except InputError as error:
        why = str(error)
    raise_on_all_ranks(why)


def broadcast_text(text: str) -> str:
    """Rank 0's text, not an empty one, on every rank."""
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=0)
    if dist.get_rank():
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    return content.numpy().tobytes().decode()
