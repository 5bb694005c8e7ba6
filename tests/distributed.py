"""Run functions on several ranks in separate processes."""

import gc
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.multiprocessing as mp

from core import log

multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preload"])
Job = tuple[Callable[..., None], tuple[Any, ...]]


def run_ranks(world_size: int, jobs: list[Job], device: str = "cpu") -> None:
    """Call each `function(*arguments)` on every rank, each with a new launcher environment.

    One set of processes runs all jobs. On CPU they are forks of a process that has imported
    everything; on GPU they are spawned, since DeepSpeed chooses a device once for a process and its
    forks. Raises with the traceback of a failing rank.
    """
    ports = free_ports(len(jobs))
    method = "forkserver" if device == "cpu" else "spawn"
    mp.start_processes(_rank, (world_size, ports, jobs), nprocs=world_size, start_method=method)


def free_ports(count: int) -> list[int]:
    """Free ports below the ephemeral range, from which a connection of gloo could take one."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 32_000), 20 * count):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"fewer than {count} free ports between 12,000 and 32,000")


def _rank(rank: int, world_size: int, ports: list[int], jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    log.init_logger()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
    }
    for port, (function, arguments) in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            function(*arguments)
        except BaseException:
            raise RuntimeError(f"rank {rank}:\n{traceback.format_exc()}") from None
        gc.collect()  # process groups of the job, whose threads would accumulate
