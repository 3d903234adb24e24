"""Floors: the least time that a job can take on this machine, measured in the benchmark's own run.

A floor is the sum of the work that no code can avoid, each at the speed that this machine gives it
with the same threads: matrix products and convolutions of the job's shapes and type, bytes read and
copied in memory, JPEG files decoded and resized. `over_floor` is the time of the job divided by its
floor. Times change from machine to machine; this ratio says how much is left to gain on any.

With one thread both are CPU seconds, which other work on the machine changes little; with several
threads or a GPU they are seconds of the clock. With one thread Numba uses one too.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

# Numba reads this when it is imported, here and in new processes. Threads that it has started but
# does not use would still spin.
if "numba" not in sys.modules:
    os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))

import numba

from reid.instructions import fast_bfloat16
from reid.neighbors.exact import BLOCK_SIZE

SAMPLE_SECONDS = 0.3
"""How long a speed is measured at least."""
Parts = dict[str, float]
"""Seconds of each part of a floor."""
_CPU_ATTENTION = {  # torch's list of operations with FLOPs lacks them
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class Floor(NamedTuple):
    """A job's time beside its floor, by one clock.

    Attributes:
        parts: Seconds of the least work, by part.
        taken: Seconds that the job took.
    """

    parts: Parts
    taken: float

    @property
    def seconds(self) -> float:
        """The least time."""
        return sum(self.parts.values())

    @property
    def over(self) -> float:
        """How many times the floor the job took."""
        return self.taken / self.seconds

    def facts(self) -> dict[str, Any]:
        """For the JSON object of a benchmark."""
        return {
            "over_floor": round(self.over, 3),
            "floor_seconds": _digits(self.seconds),
            "floor_taken_seconds": _digits(self.taken),
            "floor_parts": {name: _digits(value) for name, value in self.parts.items()},
        }


def same_threads() -> None:
    """Gives Numba as many threads as torch has."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def clock(device: str = "cpu") -> float:
    """Seconds: of the CPU with one thread, else of the clock, when the GPU has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def typical_seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """The median time of a call, after one that warms up, over three or more calls."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SAMPLE_SECONDS:
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return statistics.median(times)


def product_speed(
    m: int, k: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> float:
    """FLOP/s of (m, k) times (k, n), the second factor stored by columns as features are."""
    left, right = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2 * m * k * n / typical_seconds(lambda: torch.mm(left, right.T, out=out), device)


def read_speed(num_bytes: int, device: str = "cpu") -> float:
    """Bytes a second at which memory of this size is read."""
    memory = torch.ones(max(num_bytes // 4, 1), device=device)
    return 4 * len(memory) / typical_seconds(memory.sum, device)


def copy_speed(num_bytes: int, device: str = "cpu") -> float:
    """Bytes a second at which memory of this size is copied."""
    memory = torch.ones(max(num_bytes // 4, 1), device=device)
    other = torch.empty_like(memory)
    return 4 * len(memory) / typical_seconds(lambda: other.copy_(memory), device)


def all_pairs(count: int, dim: int, device: str = "cpu") -> Parts:
    """The floor of an exact search among `count` rows: each pair's product once.

    N (N + 1) / 2 products of D numbers, in blocks as the search has them and in the type that it
    takes here. A search that bounds products by shorter ones can be below this floor.
    """
    dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    side = min(BLOCK_SIZE, count)
    flops = count * (count + 1) * dim
    return {"products": flops / product_speed(side, dim, side, dtype, device)}


def all_compared(queries: int, count: int, dim: int, device: str = "cpu") -> Parts:
    """The products of queries with a gallery, at the best of some shapes, in single precision."""
    flops = 2 * queries * count * dim
    sides = {(min(rows, queries), min(columns, count)) for rows in (128, 2048)
             for columns in (2048, 8192)}  # fmt: skip
    best = max(product_speed(rows, dim, columns, device=device) for rows, columns in sides)
    return {"products": flops / best}


class Products(TorchDispatchMode):
    """Records the matrix products, convolutions and attentions that run inside it.

    `seconds` runs each of them alone, with random numbers of the same shapes, strides and types.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self._calls: dict[str, tuple[Callable[[], object], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in flop_registry or packet in _CPU_ATTENTION:
            self._record(func, args, kwargs)
        elif func is not torch.ops.prim.device.default:
            # In inference mode a layer arrives whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def seconds(self) -> float:
        """How long all of them take alone: the median of each, times how often it ran."""
        return sum(
            count * typical_seconds(call, self._device) for call, count in self._calls.values()
        )

    def once(self) -> float:
        """The same, with one measurement of each, for a benchmark that takes turns."""
        total = 0.0
        for call, count in self._calls.values():
            start = clock(self._device)
            call()
            total += count * (clock(self._device) - start)
        return total

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        shapes = [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf
            for leaf in tree_leaves((args, kwargs))
        ]
        key = f"{func}{shapes}"
        if key in self._calls:
            call, count = self._calls[key]
            self._calls[key] = call, count + 1
            return
        given, named = tree_map_only(Tensor, _alike, (args, kwargs))

        @torch.no_grad()
        def call() -> object:
            return func(*given, **named)

        self._calls[key] = call, 1


def _alike(tensor: Tensor) -> Tensor:
    """Random numbers of the same shape, strides and type; whole numbers are copied."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.clone()
    strides = tensor.stride()
    shape = [size if step else 1 for size, step in zip(tensor.shape, strides, strict=True)]
    made = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made.normal_().expand(tensor.shape)


def _digits(seconds: float) -> float:
    """Four digits that count."""
    return float(f"{seconds:.4g}")
