"""Answers on disk: nothing that was confirmed is ever lost, nothing broken is taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reid.files import OutputError
from reid.structures import DataError
from reid.workflows.review.journal import Answer, Journal


def answer(number: int, name: str = "a") -> Answer:
    images = (f"{name}.png", "b.png", "c.png")
    return Answer(
        number, "cluster", "same", images, (0, 1, 2), (2,), ((0, 1),), ((0, 2),), (), "model"
    )


def test_answers_come_back_and_undo_holds(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.append(answer(journal.next_number))
    assert journal.undo() == answer(3)
    journal.append(answer(journal.next_number, "\udcff\n"))  # a name that is no UTF-8
    journal.close()
    again = Journal(tmp_path)
    assert again.answers == [answer(1), answer(2), answer(4, "\udcff\n")]
    assert again.next_number == 5
    assert (tmp_path / "answers.jsonl").stat().st_mode & 0o077 == 0
    again.close()


@pytest.mark.parametrize("torn", [b"{", b'{"number": 3', b"\x00\x00\n", b"nonsense\n"])
def test_a_torn_last_line_is_dropped(
    tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    journal.append(answer(1))
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + torn)
    again = Journal(tmp_path)
    assert "cut off" in caplog.text
    assert again.answers == [answer(1)]
    again.append(answer(2))
    again.close()
    last = Journal(tmp_path)
    assert [each.number for each in last.answers] == [1, 2]
    last.close()


def test_every_cut_of_the_file_keeps_the_whole_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ends = []
    for _ in range(3):
        journal.append(answer(journal.next_number))
        ends.append(journal.path.stat().st_size)
    journal.close()
    data = journal.path.read_bytes()
    for cut in [*range(0, len(data), 5), len(data)]:
        journal.path.write_bytes(data[:cut])
        again = Journal(tmp_path)
        assert len(again.answers) == sum(end <= cut for end in ends)
        again.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: is no JSON"),
        ('{"undo": 5}', "line 2: takes back answer 5"),
        ('{"number": 1}', "line 2: is no answer"),
        (answer(1).line().replace("[[0, 1]]", "[[0, 9]]"), "out of its range"),
    ],
)
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, line: str, message: str) -> None:
    journal = Journal(tmp_path)
    journal.close()
    with journal.path.open("a") as file:
        file.write(f"{line}\n{answer(2).line()}\n")
    with pytest.raises(DataError, match=message):
        Journal(tmp_path)


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("somebody's notes")
    with pytest.raises(DataError, match="does not begin"):
        Journal(tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == "somebody's notes"


def test_an_answer_that_cannot_be_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.append(answer(1))
    before = journal.path.read_bytes()
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="No space left"):
        journal.append(answer(2))
    with pytest.raises(OutputError, match="No space left"):
        journal.undo()
    monkeypatch.undo()
    assert journal.path.read_bytes() == before
    assert journal.answers == [answer(1)]
    journal.append(answer(2))
    journal.close()


def test_a_killed_process_loses_nothing_that_it_confirmed(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from reid.workflows.review.journal import Answer, Journal
journal = Journal(Path(sys.argv[1]))
while True:
    number = journal.next_number
    journal.append(Answer(number, "pair", "same", ("a" * 5000, "b"), (0, 1), (), ((0, 1),)))
    print(number, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    confirmed = 0
    while confirmed < 20:
        confirmed = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    confirmed = int(rest[-1]) if rest else confirmed
    lines = (tmp_path / "answers.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[confirmed])["number"] == confirmed
    journal = Journal(tmp_path)
    assert confirmed <= len(journal.answers) <= confirmed + 1
    journal.close()
