"""The fuzzing harness: cases run in a child process that the test watches."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

Case = Callable[[int, Path], str]
MIB = 2**20
# Code that executes commands from a file triggers one of these audit events.
EXECUTES = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork",
            "os.startfile", "os.remove", "os.rename", "socket.connect", "shutil.rmtree",
            "pickle.find_class")  # fmt: skip


def mutated(content: bytes, rng: random.Random, others: Iterable[bytes] = ()) -> bytes:
    """Changes, cuts off, inserts or doubles some bytes, or takes some from another file."""
    data = bytearray(content)
    donors = [*others, content]
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64, 512)), len(data))
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"))
        elif kind == 3:
            data[at:at] = rng.randbytes(length)
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:at] = data[at : at + length]
        else:
            donor = rng.choice(donors)
            start = rng.randrange(len(donor) + 1)
            data[at : at + length] = donor[start : start + length]
    return bytes(data)


@pytest.fixture(name="mutated")
def _mutated() -> Callable[..., bytes]:
    return mutated


@pytest.fixture(params=[
    pytest.param(range(100), id="some"),
    pytest.param(range(100, 2300), id="many", marks=pytest.mark.slow),
])  # fmt: skip
def seeds(request: pytest.FixtureRequest) -> range:
    """A hundred cases in each run of the tests, thousands in the slow tests."""
    return request.param


@pytest.fixture
def fuzz(tmp_path: Path) -> Callable[..., Counter[str]]:
    """Runs a case for each seed; each must return a word or raise an error of ours, in bounds.

    A failure names its seed, and the same seed gives the same case again.
    """

    def run(
        case: Case,
        seeds: Iterable[int],
        ours: type[Exception],
        *,
        growth: int = 192 * MIB,
        seconds: float = 30,
        stop_after: int = 5,
    ) -> Counter[str]:
        context = multiprocessing.get_context("fork")
        outcomes: Counter[str] = Counter()
        failures: list[str] = []
        waiting = list(seeds)
        while waiting and len(failures) < stop_after:
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(
                target=_run_cases, args=(case, waiting, ours, growth, tmp_path, sender)
            )
            child.start()
            sender.close()
            while waiting and len(failures) < stop_after:
                seed = waiting[0]
                try:
                    if not receiver.poll(seconds):
                        failures.append(f"seed {seed}: is not done after {seconds} s")
                        child.kill()
                        waiting.pop(0)
                        break
                    outcome, failure = receiver.recv()
                except EOFError:
                    child.join()
                    failures.append(f"seed {seed}: the process died (exit {child.exitcode})")
                    waiting.pop(0)
                    break
                waiting.pop(0)
                outcomes[outcome] += 1
                if failure:
                    failures.append(f"seed {seed}: {failure}")
            child.kill()
            child.join()
            receiver.close()
        assert not failures, "\n\n".join(failures)
        return outcomes

    return run


def _run_cases(
    case: Case,
    seeds: list[int],
    ours: type[Exception],
    growth: int,
    folder: Path,
    sender: Connection,
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # in a real run, warnings are no errors
    executed: list[str] = []
    watching = False

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        # Our own files are renamed to their final name once they are whole.
        finished = event == "os.rename" and str(arguments[0]).endswith(".part")
        if watching and event in EXECUTES and not finished:
            executed.append(f"{event}{arguments!r}"[:300])

    sys.addaudithook(listen)
    os.chdir(folder)
    _limit_memory(8 * growth)
    peak = _peak()
    for seed in seeds:
        failure = ""
        watching = True
        try:
            outcome = case(seed, folder)
        except ours as error:
            outcome = "refused"
            if str(folder) not in str(error):
                failure = f"the message names no file: {error}"
        except BaseException:  # noqa: BLE001  (whatever it is, it is not ours)
            outcome, failure = "failed", traceback.format_exc()[-3000:]
        watching = False
        if executed:
            failure = failure or f"executed {executed}"
        executed.clear()
        if (folder / "canary").exists():
            failure = "the canary file was made"
        if _peak() - peak > growth:
            failure = failure or f"took {(_peak() - peak) // MIB} MiB more"
            peak = _peak()
        sender.send((outcome, failure))
    sender.close()


def _peak() -> int:
    """The peak memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limit_memory(more: int) -> None:
    """Sets a hard limit above the present use, so that a bomb ends only this process."""
    with contextlib.suppress(OSError):  # no /proc: no hard limit, but the peak is still measured
        present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + more, present + more))
