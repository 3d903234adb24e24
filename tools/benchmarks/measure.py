"""Shared code of the benchmarks: measures a side in a new process, prints a table and JSON.

The process gives Numba as many threads as torch has (`OMP_NUM_THREADS`).
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from floors import Floor, Parts, clock, same_threads
from tabulate import tabulate

_INTERVAL = 0.05


class Measured(NamedTuple):
    """The result of `measure`.

    Attributes:
        seconds: Time of the work.
        extra_mb: MB of peak resident memory above the inputs.
        gpu_mb: MB of peak GPU memory above the inputs; None on the CPU.
        result: The return value of the work.
        cpu_seconds: Time of all cores, user and system, which other work hardly changes.
        private_mb: Like `extra_mb`, without pages of files in memory, which the system can take
            back. It is read 20 times a second, so a shorter peak is missed.
        floor: Of the work; None: it was not measured.
    """

    seconds: float
    extra_mb: float
    gpu_mb: float | None
    result: Any
    cpu_seconds: float
    private_mb: float
    floor: Floor | None = None


def measure(
    work: Callable[..., Any],
    inputs: Callable[..., Any],
    *args: Any,
    warm_up: Any = None,
    device: str = "cpu",
    floor: Callable[..., Parts] | None = None,
) -> Measured:
    """Runs `work(inputs(*args))` in a new process.

    Args:
        work: A function of a module.
        inputs: Makes the input; its time and memory do not count. For a GPU, the input must be a
            tensor or a dict of tensors.
        *args: Arguments of `inputs`.
        warm_up: Arguments for a small input, which is processed first so that compilation and
            starting threads do not count.
        device: The input's device: `cpu` or `cuda`.
        floor: Measures the floor of the work from `args`, in the same process: before the work and
            after it, of which the mean counts.

    Raises:
        RuntimeError: The process died, for example because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(theirs, work, inputs, args, warm_up, device, floor)
    )
    process.start()
    theirs.close()
    try:
        private = before = ours.recv()
        while not ours.poll(_INTERVAL):
            private = max(private, memory_of("RssAnon", process.pid))
        ours.recv()  # the work has ended
        measured: Measured = ours.recv()
    except (EOFError, RuntimeError):
        process.join()
        raise RuntimeError(f"{work.__name__} died with exit code {process.exitcode}") from None
    process.join()
    return measured._replace(private_mb=private - before)


def _child(
    pipe: Connection,
    work: Callable[..., Any],
    inputs: Callable[..., Any],
    args: tuple[Any, ...],
    warm_up: Any,
    device: str,
    floor: Callable[..., Parts] | None = None,
) -> None:
    gpu_mb, limit = None, None
    same_threads()
    if warm_up is not None:
        work(_put(inputs(*warm_up), device))
    parts = floor(*args) if floor else {}
    data = _put(inputs(*args), device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        gpu_before = torch.cuda.memory_allocated()
    before = memory_of("VmRSS")
    # resets the peak (Linux 4.0 and newer)
    Path("/proc/self/clear_refs").write_text("5")
    pipe.send(memory_of("RssAnon"))
    start, start_cpu, since = time.perf_counter(), time.process_time(), clock("cpu")
    result = work(data)
    if device == "cuda":
        torch.cuda.synchronize()
        gpu_mb = (torch.cuda.max_memory_allocated() - gpu_before) / 2**20
    seconds, taken = time.perf_counter() - start, clock("cpu") - since
    cpu, extra = time.process_time() - start_cpu, memory_of("VmHWM") - before
    pipe.send("the work has ended")
    if floor:
        again = floor(*args)
        parts = {name: (value + again[name]) / 2 for name, value in parts.items()}
        limit = Floor(parts, seconds if device == "cuda" else taken)
    pipe.send(Measured(seconds, extra, gpu_mb, result, cpu, 0.0, limit))


def _put(data: Any, device: str) -> Any:
    if device == "cpu":
        return data
    if isinstance(data, dict):
        return {name: value.to(device) for name, value in data.items()}
    return data.to(device)


def memory_of(field: str, process: int | str | None = "self") -> float:
    """MB, from the status of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {field}")


def report(
    stage: str,
    size: str,
    product: tuple[float, float | None],
    baseline: tuple[float, float | None] | None,
    agrees: bool | None,
    floor: Floor | None,
    **more: Any,
) -> None:
    """Prints a table of both sides and the floor, and one JSON object as the last line.

    Args:
        stage: The name of the benchmark.
        size: The size of the input.
        product: Seconds and extra MB (None = not measured).
        baseline: Seconds and extra MB of the baseline; None = it was not run.
        agrees: Whether the results are the same; None = not compared.
        floor: The job's time and floor; see `floors`.
        **more: Further facts for the JSON object.
    """
    ratio = baseline[0] / product[0] if baseline else None
    rows = [("this project", f"{product[0]:.2f}", _whole(product[1]), "")]
    if baseline and ratio:
        rows.append(("baseline", f"{baseline[0]:.2f}", _whole(baseline[1]), f"{ratio:.1f}x slower"))
    if floor:
        told = f"over_floor {floor.over:.2f} ({floor.taken:.4g} s, by the floor's clock)"
        rows.append(("floor", f"{floor.seconds:.4g}", "", told))
    headers = (f"{stage}, {size}", "seconds", "MB above the input", "")
    line: Mapping[str, Any] = {
        "stage": stage,
        "size": size,
        "seconds": round(product[0], 3),
        "baseline_seconds": round(baseline[0], 3) if baseline else None,
        "ratio": round(ratio, 2) if ratio else None,
        "extra_mb": _rounded(product[1]),
        "baseline_extra_mb": _rounded(baseline[1]) if baseline else None,
        "agrees": agrees,
        **(floor.facts() if floor else {}),
        **more,
    }
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\n{tabulate(rows, headers=headers, disable_numparse=True)}\n"
        f"{json.dumps(line)}\n"
    )


def _whole(megabytes: float | None) -> str:
    return "not measured" if megabytes is None else f"{megabytes:,.0f}"


def _rounded(megabytes: float | None) -> float | None:
    return None if megabytes is None else round(megabytes, 1)
