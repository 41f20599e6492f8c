"""Several ranks without a run: forked processes that form a group over gloo."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def on_ranks(function: Callable[[int], Any], ranks: int = 2) -> list[Any]:
    """Return what ``function(rank)`` returns on each rank, or the exception that it raises."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_run, args=(function, rank, ranks, f"file://{folder}/meeting", pipes[rank][1]))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            return [receiver.recv() if receiver.poll(60) else "no answer" for receiver, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run(function: Callable[[int], Any], rank: int, ranks: int, meeting: str, answer: Any) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=30))
    try:
        answer.send(function(rank))
    except Exception as error:
        answer.send(error)
    dist.barrier()
