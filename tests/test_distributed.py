"""Work that the main process does for all, and work that it shares with the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes

from reid import distributed

WORLD_SIZE = 2


def part(rows: Tensor, progress: Any) -> tuple[int, float, bool]:
    """Returns the process's number, the sum of its rows, and whether it has the progress bar."""
    return distributed.rank(), float(rows.sum()), progress is not None


def broken_part(rows: Tensor, progress: Any) -> float:
    if distributed.rank() == WORLD_SIZE - 1:
        raise MemoryError("too much")
    return float(rows.sum())


def shared(part: Callable[..., Any]) -> list[Any]:
    assert distributed.others_wait()
    return distributed.run_together(part, torch.arange(6.0).reshape(3, 2), lambda done, total: None)


def after_an_error() -> str:
    try:
        shared(broken_part)
    except distributed.PartError as error:
        return f"{error}, then {shared(part)}"
    return "no error"


def fail() -> None:
    raise KeyError("main")


def error_of(work: Callable[[], Any]) -> str:
    try:
        distributed.run_on_main(work)
    except (KeyError, distributed.PartError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def process(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    results = {
        "rank": distributed.run_on_main(distributed.rank),
        "parts": distributed.run_on_main(lambda: [shared(part), shared(part)]),
        "caught": distributed.run_on_main(after_an_error),
        "error of a part": error_of(lambda: shared(broken_part)),
        "error of the work": error_of(fail),
        "waiting": distributed.others_wait(),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_main_process_works_and_the_others_take_their_parts(tmp_path: Path) -> None:
    start_processes(  # type: ignore[no-untyped-call]
        process, (str(tmp_path),), nprocs=WORLD_SIZE, start_method="forkserver"
    )
    parts = [(0, 15.0, True), (1, 15.0, False)]
    for rank in range(WORLD_SIZE):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == {
            "rank": 0,
            "parts": [parts, parts],
            "caught": f"process 1: MemoryError: too much, then {parts}",
            "error of a part": "PartError: process 1: MemoryError: too much",
            "error of the work": "KeyError: 'main'",
            "waiting": False,
        }


def test_one_process_works_alone() -> None:
    assert distributed.run_on_main(lambda: distributed.others_wait()) is False
    with pytest.raises(KeyError, match="main"):
        distributed.run_on_main(fail)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"RANK": "3"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4"}, False),
        ({"RANK": "3", "WORLD_SIZE": "4"}, True),
    ],
)
def test_only_processes_of_a_group_are_beside_the_main_one(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_started_beside_main() == expected
