"""Two processes of one distributed run, connected by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch


def two_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run ``work(rank, folder)`` of a test module in two processes, forked from one that has imported it (and transformers) once."""
    multiprocessing.set_forkserver_preload([work.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, args=(work, folder, port), nprocs=2, start_method="forkserver")


def _rank(rank: int, work: Callable[[int, Path], None], folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    work(rank, folder)
    torch.distributed.destroy_process_group()
