"""Batches whose loss is not finite: the run stops or skips them, and a file describes them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from reid import distributed
from reid.files import write_text

logger = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]
_ADVICE = (
    "a lower solver.base_lr, solver.clip_grad_norm or solver.amp: bf16 may help; "
    "solver.on_nonfinite: skip leaves out such batches"
)


class NonFiniteLosses:
    """Stops a run at the first loss that is not finite, or skips a limited number of such batches.

    A skipped batch changes only the random numbers: parameters, running statistics and memories
    stay as they were. When gradients are accumulated, the gradients that its group has gathered so
    far are dropped too.

    Args:
        action: `stop` or `skip`.
        limit: How many batches a run may skip; the next one stops it.
        paths: Files of the training images, by index; for the report.
        output_dir: The report is written here; None: no report.

    Attributes:
        action: `stop` or `skip`.
        skipped: Batches skipped so far.

    Raises:
        ValueError: The action is unknown, or the limit is below 0.
    """

    def __init__(
        self,
        action: OnNonFinite = "stop",
        limit: int = 10,
        paths: Sequence[str] = (),
        output_dir: Path | None = None,
    ) -> None:
        if action not in ("stop", "skip") or limit < 0:
            raise ValueError(
                "expected the action stop or skip and a limit of 0 or more, got "
                f"{action!r} and {limit}"
            )
        self.action = action
        self.skipped = 0
        self._limit = limit
        self._paths = paths
        self._output_dir = output_dir

    def handle(self, report: Mapping[str, Any], rows: Sequence[int], *, here: bool) -> None:
        """Reports a batch and counts it; stops the run unless the batch may be skipped.

        Args:
            report: `step` and `epoch` from 1, `losses`, and more for the file.
            rows: Indices of the batch's images.
            here: Whether the loss is not finite on this process.

        Raises:
            FloatingPointError: The run must stop.
        """
        where = f"step {report['step']}, epoch {report['epoch']}"
        losses = ", ".join(f"{name} {value:.4g}" for name, value in report["losses"].items())
        seen = ""
        if not here:
            losses = "on another process"
        elif self._output_dir is not None:
            suffix = f"_rank{distributed.rank()}" if distributed.is_distributed() else ""
            path = self._output_dir / f"nonfinite_step{report['step']}{suffix}.json"
            images = [self._paths[row] if self._paths else row for row in rows]
            write_text(path, json.dumps(_json({**report, "images": images}), indent=2) + "\n")
            seen = f"; losses, activations and the batch's images are in {path}"
        if self.action == "skip" and self.skipped < self._limit:
            self.skipped += 1
            logger.warning(
                "%s: the loss is not finite (%s); skipped the batch, number %d of at most %d%s",
                where, losses, self.skipped, self._limit, seen,
            )  # fmt: skip
            return
        count = f" after {self.skipped} skipped batches" if self.action == "skip" else ""
        raise FloatingPointError(
            f"{where}: the loss is not finite ({losses}){count}{seen}. --resume goes on from the "
            f"last checkpoint, which this batch did not change; {_ADVICE}"
        )


def check_finite(module: nn.Module, epoch: int) -> None:
    """Requires that everything a checkpoint would hold is finite; waits for the GPU once.

    Raises:
        FloatingPointError: A tensor of the module's state is not finite; names the first ones.
    """
    state = {
        name: value for name, value in module.state_dict().items() if value.is_floating_point()
    }
    broken = _not_finite(state)
    if broken:
        raise FloatingPointError(
            f"epoch {epoch}: every loss was finite, but at the end {len(broken)} of {len(state)} "
            f"tensors of the model are not finite: {', '.join(broken[:4])}; probably a gradient "
            f"overflowed. --resume goes on from the last checkpoint, which is sound; {_ADVICE}"
        )


def largest_activations(
    model: nn.Module, forward: Callable[[], object]
) -> tuple[list[dict[str, Any]], str | None]:
    """The largest output values of a model's modules in a forward pass.

    Args:
        model: Its modules are watched.
        forward: Runs the model once.

    Returns:
        A list with the largest first, one entry for each module whose output has tensors:
        `module`, `largest` absolute finite value, `not_finite` and `values` (counts). And the first
        module to finish with an output that is not finite, or None.
    """
    outputs: list[dict[str, Any]] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = [t.detach().float() for t in _tensors(output) if t.is_floating_point()]
            if not any(t.numel() for t in tensors):
                return
            values = torch.cat([t.flatten() for t in tensors])
            finite = torch.isfinite(values)
            outputs.append(
                {
                    "module": name or "(model)",
                    "largest": float(values.abs().where(finite, 0).max()),
                    "not_finite": int((~finite).sum()),
                    "values": values.numel(),
                }
            )

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
    try:
        # A compiled network would not call the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    first = next((entry["module"] for entry in outputs if entry["not_finite"]), None)
    return sorted(outputs, key=lambda entry: -cast(float, entry["largest"])), first


def broken_parameters(model: nn.Module) -> list[str]:
    """The names of parameters with values that are not finite."""
    return _not_finite(dict(model.named_parameters()))


class LaterNumber:
    """A number from a GPU. Reading it waits until it is computed, not for work queued later."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach()
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value = host.copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(value.device))

    def __float__(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


class BufferCopy:
    """A copy of a module's buffers (running statistics), which can be restored.

    Args:
        module: Its buffers are copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def restore(self, condition: Tensor | None = None) -> None:
        """Restores the buffers; does not wait for a GPU.

        Args:
            condition: () bool on the buffers' device; false: they are not restored. None = true.
        """
        for name, value in self._values.items():
            buffer = self._module.get_buffer(name)
            buffer.copy_(value if condition is None else torch.where(condition, value, buffer))


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    if not tensors:
        return []
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    return [name for name, good in zip(tensors, finite.tolist(), strict=True) if not good]


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


def _json(value: Any) -> Any:
    """Turns NaN and infinity into text, since JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
