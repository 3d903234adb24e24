"""The process that runs sections: `python -m reid.workflows.gpu_check.worker IN OUT`.

IN and OUT are file descriptors. A line on IN is a section to run, as `runner` sends it; each line
on OUT is a message: `ready`, what `Findings` sends, and in the end `done` or `error`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from reid.workflows.gpu_check.findings import Clock, Context, Findings, line
from reid.workflows.gpu_check.sizes import FULL, TOY

_MARGIN = 0.06
"""Share of its time that a section leaves unused, so that it ends by itself before it is ended."""

_HERE = ("reid", "torch")
"""A module of these that is missing is a mistake of ours, not of the machine."""


class NoDeviceError(RuntimeError):
    """There is no such device here, so that no section can run."""


def main() -> None:
    """Runs sections until IN ends, which ends everything."""
    orders, answers = (int(argument) for argument in sys.argv[1:3])
    os.set_inheritable(answers, False)  # or children that live on would keep the pipe open
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders, asked), daemon=True).start()
    # What takes seconds is done before a section's time runs. A module that is missing or broken
    # is told by the first section that needs it.
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{__package__}.parts").import_parts()
    with os.fdopen(answers, "w") as told:
        send(told, {"kind": "ready"})
        while True:
            order = json.loads(asked.get())
            try:
                run(order, lambda message: send(told, message))
            except Exception as error:  # noqa: BLE001 - told to the runner, which writes it down
                send(told, explained(error))
            else:
                send(told, {"kind": "done"})


def _listen(orders: int, asked: queue.SimpleQueue[str]) -> None:
    """Hands lines on; when they end, ends this process and all that it has started.

    So nothing goes on, not even a section that hangs, where the runner itself was killed.
    """
    with os.fdopen(orders) as lines:
        for text in lines:
            asked.put(text)
    os.killpg(0, signal.SIGKILL)


def run(order: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Runs a section.

    Args:
        order: `run`, `seconds`, `device`, `sizes` and the `numbers` of earlier sections.
        tell: Takes what it sees.

    Raises:
        NoDeviceError: It is for a GPU, and there is none.
        Exception: What the section raises.
    """
    clock = Clock(order["seconds"] * (1 - _MARGIN))
    import torch  # here, so that it is a section that says if there is none

    device = torch.device("cpu")
    if order["device"] == "cuda":
        if not torch.cuda.is_available():
            raise NoDeviceError("torch sees no CUDA device; --device cpu tries all of it out small")
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    module, _, name = order["run"].partition(":")
    work: Callable[[Context], None] = getattr(importlib.import_module(module), name)
    sizes = FULL if order["sizes"] == "full" else TOY
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        work(Context(device, sizes, clock, Findings(tell), order["numbers"], folder))


def explained(error: Exception) -> dict[str, Any]:
    """The error as a message; a module that cannot be imported is named."""
    missing = ""
    name = (getattr(error, "name", None) or "").split(".")[0]
    absent = isinstance(error, ModuleNotFoundError) and name not in _HERE
    # numba, for one, refuses a numpy that is too new for it, and names no module then.
    refused = isinstance(error, ImportError) and not name
    if absent or refused:
        missing = f"{name or 'a module'} cannot be imported ({error})"
    return {
        "kind": "error",
        "text": "".join(traceback.format_exception(error)),
        "last": ": ".join((type(error).__name__, *str(error).strip().splitlines()[-1:])),
        "missing": missing,
        "fatal": isinstance(error, NoDeviceError),
    }


def send(told: TextIO, message: Mapping[str, Any]) -> None:
    """Writes a message as a line, at once."""
    told.write(line(message))
    told.flush()


if __name__ == "__main__":
    main()
