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
"""Share of its time that a section leaves unused, so that it ends before the runner ends it."""

_HERE = ("reid", "torch")
"""If a module of these packages is missing, the mistake is ours, not the machine's."""


class NoDeviceError(RuntimeError):
    """The device does not exist, so no section can run."""


def main() -> None:
    """Runs sections until IN ends; then ends this process and its children."""
    orders, answers = (int(argument) for argument in sys.argv[1:3])
    os.set_inheritable(answers, False)  # otherwise surviving children would keep the pipe open
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders, asked), daemon=True).start()
    # Slow imports come before the clock of the first section. The first section that needs a
    # missing or broken module reports it.
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
    """Passes lines on; when they end, ends this process and all of its children.

    If the runner is killed, this also ends a section that hangs.
    """
    with os.fdopen(orders) as lines:
        for text in lines:
            asked.put(text)
    os.killpg(0, signal.SIGKILL)


def run(order: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Runs a section.

    Args:
        order: `run`, `seconds`, `device`, `sizes` and the `numbers` of earlier sections.
        tell: Receives its messages.

    Raises:
        NoDeviceError: The section is for a GPU, but there is none.
        Exception: Any error of the section.
    """
    clock = Clock(order["seconds"] * (1 - _MARGIN))
    import torch  # imported here, so that a section reports it if torch is missing

    device = torch.device("cpu")
    if order["device"] == "cuda":
        if not torch.cuda.is_available():
            raise NoDeviceError("torch sees no CUDA device; --device cpu runs all at toy size")
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
    # numba, for example, refuses a numpy that is too new, with an error that names no module.
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
