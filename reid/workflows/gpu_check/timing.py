"""Measures time and memory on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reid.workflows.gpu_check.findings import Clock

_TOY_S = 0.05
_MOST_CALLS = 2000


@dataclass(frozen=True)
class Timing:
    """The time of a call.

    Attributes:
        seconds: Median seconds over the rounds.
        lowest: Seconds of the fastest round.
        highest: Seconds of the slowest round.
        peak_mb: Peak memory of the device in MB; None on a CPU.
    """

    seconds: float
    lowest: float
    highest: float
    peak_mb: float | None

    @property
    def spread(self) -> str:
        """Lowest to highest, in milliseconds."""
        return f"{1e3 * self.lowest:.3g} to {1e3 * self.highest:.3g}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Frees unused memory, and starts measuring a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: torch.device) -> float | None:
    """Peak memory in MB since `free_memory`; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**20


def time_calls(
    work: Callable[[], object],
    device: torch.device,
    clock: Clock,
    *,
    seconds: float,
    warm_up: int = 3,
    rounds: int = 3,
) -> Timing:
    """Times a call, in rounds of many calls; waits for the device before and after each round.

    Args:
        work: The function to call.
        device: The device it uses.
        clock: Ends the rounds early, but not before the first.
        seconds: Time for all rounds together. A toy run asks for so little that its times say
            nothing: it gets one call before a single round.
        warm_up: Calls before the first round.
        rounds: Number of rounds; the result is their median.
    """
    if seconds < _TOY_S:
        warm_up = rounds = 1
    for _ in range(max(warm_up, 1)):
        work()
    synchronize(device)
    once = _round(work, device, 1)
    calls = min(max(round(seconds / rounds / max(once, 1e-9)), 1), _MOST_CALLS)
    taken = [_round(work, device, calls)]
    while len(taken) < rounds and clock.left() > calls * taken[-1]:
        taken.append(_round(work, device, calls))
    return Timing(statistics.median(taken), min(taken), max(taken), peak_mb(device))


def _round(work: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


class Laps:
    """Times the parts of repeated work without waiting for the device.

    On a GPU, events in its stream mark the ends of parts. The time of a part includes the work of
    the device and its waiting for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def lap(self, part: str) -> None:
        """Counts the time since the last call for `part`."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Total time by part, without the time before the first call."""
        synchronize(self._device)
        found: defaultdict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) or isinstance(after, float):
                assert isinstance(before, float)
                assert isinstance(after, float)
                found[part] += 1e3 * (after - before)
            else:
                found[part] += before.elapsed_time(after)
        return dict(found)


def step_flops(network: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Counts floating point operations of forward and backward, by the network's definition.

    Multiplications and additions count one each; only matrix products and convolutions count.

    Args:
        network: Its gradients are cleared afterwards.
        forward: Returns the number to start the backward pass from.
    """
    with FlopCounterMode(display=False) as counter:
        forward().backward()  # type: ignore[no-untyped-call]
    network.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())
