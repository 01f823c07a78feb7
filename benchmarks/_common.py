"""What the benchmarks share: a clock that suits the device, the matmul peak, paired timing, and bars."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def clock(device: str = "cpu", *, wall: bool = False) -> float:
    """Seconds. On a CPU those of this process (all threads), so that a busy neighbour counts less; on a GPU of the wall, once idle.

    ``wall`` takes the wall's on a CPU too, for work of several threads: seconds of the process miss what the other threads did within
    a few milliseconds (a matrix product of the peak), and count what they spin while they wait for each other.
    """
    if device == "cpu":
        return time.perf_counter() if wall else time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_peak_flops(device: str = "cpu", dtype: torch.dtype = torch.float32, *, wall: bool = False, repeats: int = 8) -> float:
    """The best matrix-product rate seen, in flop per second of ``clock``, with as many threads as torch has here."""
    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(repeats):
            start = clock(device, wall=wall)
            a @ b
            best = max(best, 2 * size**3 / (clock(device, wall=wall) - start))
    return best


def paired(ways: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every way in every repeat, each timed here; see ``paired_seconds``."""

    def timed(way: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            gc.collect()
            start = clock(device)
            way()
            return clock(device) - start

        return run

    return paired_seconds({name: timed(way) for name, way in ways.items()}, repeats)


def paired_seconds(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What every way says it took, in every repeat; ways take turns, so that a slow spell of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in ways if repeat % 2 == 0 else reversed(list(ways)):
            seconds[name].append(ways[name]())
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is: the median over repeats of the ratio within a repeat."""
    return median(s / f for s, f in zip(seconds[slow], seconds[fast]))


def bar(name: str, value: float, least: float) -> bool:
    """Print whether a value reaches its bar."""
    print(f"{'PASS' if value >= least else 'FAIL'}  {name}: {value:.2f} (at least {least:g})")
    return value >= least
