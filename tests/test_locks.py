from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reid.locks import FolderInUse, locked

HOLD = """
import sys
from pathlib import Path
from reid.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_holder_is_told_of_the_first(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(FolderInUse, match=f"in use by process {holder.pid} on "),
            locked(tmp_path),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        assert (tmp_path / "run.lock").exists()
        with locked(tmp_path):  # the system has released the lock
            assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        holder.kill()
        holder.communicate()


def test_a_lock_ends_with_its_block_and_makes_the_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "new"), pytest.raises(FolderInUse), locked(tmp_path / "new"):
            pass
        assert not (tmp_path / "new" / "run.lock").exists()


def test_a_link_in_the_lock_file_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"run\.lock: cannot be written"), locked(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
