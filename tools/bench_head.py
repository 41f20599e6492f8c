"""What log-probabilities from hidden states save: ``python tools/bench_head.py`` prints the rows of docs/benchmarks.md.

V = 151,936, hidden 896, 2,048 tokens, float32, one thread; forward and backward to hidden states and head, in turn with whole logits.
Memory is the peak of the process above what it held before, without the head's own gradient, which both hand over.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rlmod import ops
from rlmod.head import logprobs_and_entropy

V, N, D = 151_936, 2_048, 896


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(step: Callable[[Tensor], Tensor], hidden: Tensor, upstream: Tensor) -> tuple[float, int, Tensor]:
    """CPU seconds, peak bytes, and the values."""
    hidden = hidden.clone().requires_grad_()
    before = peak = resident()
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    values = step(hidden)
    (values * upstream).sum().backward()
    seconds = time.process_time() - started
    running = False
    watcher.join()
    return seconds, peak - before - V * D * 4, values.detach()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=3)
    repetitions = options.parse_args().repetitions
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head, hidden = nn.Linear(D, V, bias=False), torch.randn(N, D)
    ids, upstream = torch.randint(V, (N,)), torch.randn(N)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "whole logits": lambda h: ops.token_logprobs(head(h)[None], ids[None])[0],
        "in chunks": lambda h: logprobs_and_entropy(h, head, ids, entropy=False)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    values: dict[str, Tensor] = {}
    for _ in range(repetitions):
        for name, way in ways.items():
            head.weight.grad = None
            taken, peak, values[name] = measured(way, hidden, upstream)
            seconds[name].append(taken)
            peaks[name].append(peak)
    plain, chunked = ways
    difference = float((values[plain] - values[chunked]).abs().max())
    ratios = [b / a for a, b in zip(seconds[plain], seconds[chunked], strict=True)]
    print("| | CPU seconds, median | peak MiB | ")
    print("|---|---|---|")
    for name in ways:
        print(f"| {name} | {statistics.median(seconds[name]):.1f} | {statistics.median(peaks[name]) / 2**20:.0f} |")
    print(
        f"\ntime {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of whole logits', {repetitions} pairs; "
        f"largest difference of the values {difference:.1e}"
    )


if __name__ == "__main__":
    main()
