"""The check of a GPU when sections hang, fail, die or cannot run."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reid.workflows.gpu_check import docs, runner
from reid.workflows.gpu_check.aims import aims
from reid.workflows.gpu_check.findings import Findings
from reid.workflows.gpu_check.page import page
from reid.workflows.gpu_check.runner import Settings, check, is_right
from reid.workflows.gpu_check.sections import SECTIONS, Section, chosen

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
FAKES = '''
import os, subprocess, sys, time

def good(context):
    context.found.check("1 is 1", True, "1 and 1")
    context.found.row("Times", what="a <b>thing</b>", ms=1234.5)
    context.found.number("answer", 42.0)
    context.found.note("A note.")

def follows(context):
    context.found.number("seen", context.number("good", "answer"))
    context.found.cut("the rest")

def wrong(context):
    context.found.check("1 is 2", False, "1 and 2")

def fails(context):
    context.found.number("before", 1)
    raise ValueError("a reason\\nin two lines")

def hangs(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.found.number("child", child.pid)
    with open("child.part", "w") as file:
        file.write(str(child.pid))
    os.rename("child.part", "child")
    time.sleep(600)

def dies(context):
    print("the last words", flush=True)
    os._exit(7)

def imports(context):
    import a_package_that_nobody_has

def told(context):
    context.found.number("variable", os.environ.get("A_VARIABLE", "none"))
'''  # fmt: skip
TORCH = """
import os

class device(str):
    def __new__(cls, name, index=0):
        return str.__new__(cls, name)

class cuda:
    def is_available():
        return "FAKE_GPU" in os.environ

    set_device = empty_cache = reset_peak_memory_stats = lambda *_: None
"""


def fake(name: str, share: float = 1.0, **options: Any) -> Section:
    options = {"needs": (), **options}
    return Section(name, f"Section {name}", "right", f"fake_sections:{name}", share, **options)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A module with fake sections, and a stand-in for torch, whose import takes seconds."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "fake_sections.py").write_text(FAKES)
    (folder / "torch.py").write_text(TORCH)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return Settings("cpu", 5.0, tmp_path / "out", "toy")


def run(settings: Settings, *sections: Section) -> dict[str, Any]:
    """The sections' results by name."""
    results = check(sections, settings, lambda line: None)
    return {found["name"]: found for found in results["sections"]}


def is_alive(pid: int) -> bool:
    """Whether a process is running and not just a zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_section_that_fails_dies_or_hangs_does_not_harm_others(settings: Settings) -> None:
    written: list[list[str]] = []

    def tell(line: str) -> None:
        stored = json.loads((settings.folder / runner.JSON).read_text())
        written.append([found["status"] for found in stored["sections"]])
        assert (settings.folder / runner.PAGE).read_text().endswith("</html>\n")

    sections = [fake("good"), fake("fails"), fake("dies"), fake("hangs", 0.004), fake("wrong"),
                fake("imports"), fake("follows")]  # fmt: skip
    begun = time.monotonic()
    results = check(sections, settings, tell)
    assert time.monotonic() - begun < 100  # nothing waited for the section that hangs
    found = {one["name"]: one for one in results["sections"]}
    statuses = ["done", "failed", "failed", "out of time", "wrong", "left out", "cut short"]
    assert [found[section.name]["status"] for section in sections] == statuses
    # After each section, the file holds all results so far.
    assert written == [statuses[: number + 1] for number in range(len(sections))]

    assert found["good"]["checks"] == [{"what": "1 is 1", "right": True, "seen": "1 and 1"}]
    assert found["good"]["tables"] == {"Times": [{"what": "a <b>thing</b>", "ms": 1234.5}]}
    assert found["follows"]["numbers"] == {"seen": 42.0}  # a number of an earlier section
    assert found["fails"]["numbers"] == {"before": 1}  # numbers from before the error count
    assert "Traceback" in found["fails"]["error"]
    assert found["fails"]["why"] == "ValueError: in two lines"
    assert "ended with code 7" in found["dies"]["error"]
    assert "the last words" in found["dies"]["error"]
    assert "a_package_that_nobody_has" in found["imports"]["why"]
    assert found["hangs"]["seconds"] < found["hangs"]["limit"] + 5
    child = found["hangs"]["numbers"]["child"]
    until = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(child)
    assert not is_right(results)


def test_a_missing_package_is_named_with_the_sections_that_need_it(settings: Settings) -> None:
    sections = fake("wrong", needs=("numba", "nobody_has_this")), fake("good")
    results = check(sections, settings, lambda line: None)
    assert results["missing"] == {"nobody_has_this": ["wrong"]}
    assert [found["status"] for found in results["sections"]] == ["left out", "done"]
    assert results["sections"][0]["why"] == "needs nobody_has_this"
    assert is_right(results)
    assert "nobody_has_this is not installed" in page(results)


def test_no_section_starts_without_time(settings: Settings) -> None:
    late = Settings("cpu", 0.001, settings.folder, "toy")
    assert run(late, fake("good"))["good"]["status"] == "not run"


def test_a_section_may_have_a_process_and_variables_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Background", lambda *_, **__: None)
    monkeypatch.setenv("FAKE_GPU", "1")
    alone = fake("told", alone=True, environment={"A_VARIABLE": "here"})
    on_gpu = Settings("cuda", 5.0, settings.folder, "full")
    found = run(on_gpu, fake("good"), alone, fake("follows"))
    assert found["told"]["numbers"] == {"variable": "here"}
    assert found["follows"]["numbers"] == {"seen": 42.0}


def test_without_a_device_nothing_runs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Background", lambda *_, **__: None)
    found = run(Settings("cuda", 5.0, settings.folder, "full"), fake("good"), fake("wrong"))
    assert found["good"]["status"] == "failed"
    assert "torch sees no CUDA device" in found["good"]["why"]
    assert found["wrong"]["status"] == "not run"


def test_an_interrupted_run_leaves_what_it_has(settings: Settings) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check([fake("good"), fake("wrong")], settings, stop)
    stored = json.loads((settings.folder / runner.JSON).read_text())
    assert [found["status"] for found in stored["sections"]] == ["done"]


def test_no_process_outlives_a_killed_runner(settings: Settings, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from reid.workflows.gpu_check.runner import Settings, check\n"
        "from reid.workflows.gpu_check.sections import Section\n"
        "hangs = Section('hangs', '', 'right', 'fake_sections:hangs', 1, ())\n"
        f"check([hangs], Settings('cpu', 5.0, Path({str(settings.folder)!r}), 'toy'), print)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], env=dict(os.environ)) as process:
        file = settings.folder / "child"
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    child = int(file.read_text())
    until = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(child)


def test_nan_and_infinity_become_text() -> None:
    sent: list[dict[str, Any]] = []
    found = Findings(sent.append)
    found.number("nan", float("nan"))
    found.row("t", value=float("inf"), other=1 / 3)
    assert sent[0]["value"] == "nan"
    assert sent[1]["row"] == {"value": "inf", "other": 0.333333}


class Tags(HTMLParser):
    """Checks that tags are closed in the right order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)
        assert not {"src", "href"} & {name for name, value in attrs if not value.startswith("#")}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def results_of(**changes: Any) -> dict[str, Any]:
    """Results as of a run on a GPU, with a failed check."""

    def section(name: str, group: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name, "title": f"The {name}", "group": group, "status": "done", "why": "",
            "seconds": 2.0, "limit": 9.0, "checks": [], "tables": {}, "numbers": {}, "notes": [],
            "cuts": [], "error": "", **more,
        }  # fmt: skip

    rows = [{"batch": 32, "images per s": 1234.5, "of | it": None}, {"batch": 256, "more": True}]
    return {
        "format": 1, "started": "2027-01-02T03:04:05+00:00", "commit": "abc1234",
        "device": "cuda", "sizes": "full", "minutes": 6.0, "seconds": 321.0, "missing": {},
        "aims": [], "sections": [
            section("machine", "machine", numbers={"device": "A <card>", "torch": "2.9"}),
            section("losses", "right", status="wrong", checks=[
                {"what": "a is b", "right": True, "seen": ""},
                {"what": "c is d", "right": False, "seen": "c & e"},
            ]),
            section("training", "fast", tables={"Steps": rows}, notes=["Of the product."],
                    numbers={"utilisation_large": 0.37}),
            section("plain_step", "fast", numbers={"ratio_small": 7.5}),
            section("stages", "fast", numbers={"loss_share_small": 0.05}),
            section("modes", "fast", status="out of time", why="ended after its 9 s",
                    numbers={"utilisation_large": 0.41}),
        ], **changes,
    }  # fmt: skip


def test_the_page_holds_everything_and_loads_nothing() -> None:
    results = results_of()
    results["aims"] = aims(results)
    results["sections"][3] |= {"status": "failed", "error": "Traceback <here>"}
    tags = Tags()
    tags.feed(page(results))
    assert not tags.open
    text = " ".join(tags.texts)
    for words in ("A <card>", "1 of 2 checks do not hold", "c is d", "c & e", "Traceback <here>",
                  "ended after its 9 s", "Of the product.", "1,234", "commit abc1234",
                  "reached"):  # fmt: skip
        assert words in text, words


def test_aims_are_compared_with_the_best_measurement() -> None:
    told = aims(results_of())
    assert [aim["reached"] for aim in told] == [True, True, True]
    assert told[0]["seen"] == "41.0%"  # the compiled step, though its section was cut short
    assert not aims(results_of(sizes="toy"))
    slow = results_of()
    slow["sections"][4]["numbers"] = {"loss_share_small": 0.3}
    assert not aims(slow)[2]["reached"]


def test_a_run_fills_the_section_of_the_docs(tmp_path: Path) -> None:
    results = results_of()
    results["aims"] = aims(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    guide = tmp_path / "benchmarks.md"
    guide.write_text(f"before\n{docs.BEGIN}\n{docs.EMPTY}{docs.END}\nafter\n")
    docs.write_docs(tmp_path / "results.json", guide)
    text = guide.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert docs.EMPTY not in text
    for words in ("A <card>", "torch 2.9", "commit abc1234", "1 of 2 checks hold",
                  "- c is d (c & e)", "- The modes: out of time", "**Steps**",
                  "| batch | images per s | of \\| it | more |",
                  "| 32 | 1,234 |", "| 256 |", "Of the product."):  # fmt: skip
        assert words in text, words
    docs.write_docs(tmp_path / "results.json", guide)
    assert guide.read_text() == text


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (results_of(device="cpu", sizes="toy"), "expected a run on a GPU at full size"),
        ({"format": 1}, r"expected the gpu_check.json of a run \(KeyError: 'device'\)"),
        ([], "expected the gpu_check.json of a run"),
    ],
)
def test_other_results_do_not_go_into_the_docs(tmp_path: Path, results: Any, message: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(docs.DocsError, match=message):
        docs.write_docs(tmp_path / "results.json", BENCHMARKS)


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(docs.DocsError, match=r"page.md: expected one line"):
        docs.replaced(f"{docs.END}\n{docs.BEGIN}\n", "", "page.md")


def test_the_benchmarks_have_a_section_that_says_whether_a_gpu_was_seen() -> None:
    text = BENCHMARKS.read_text("utf-8")
    between = text.partition(f"{docs.BEGIN}\n")[2].partition(docs.END)[0]
    assert between == docs.EMPTY or "checks hold" in between
    assert docs.replaced(text, between, "benchmarks.md") == text


def test_every_section_is_there_and_described() -> None:
    for section in SECTIONS:
        module, _, name = section.run.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), section.name
    described = (ROOT / "docs" / "gpu_check.md").read_text("utf-8")
    assert not [one.name for one in SECTIONS if f"`{one.name}`" not in described]
    assert [section.name for section in chosen(["ranking", "machine"])] == ["machine", "ranking"]


def test_an_unknown_section_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "speed"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "gpu_check.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "there is no section speed; there are machine, gpu_tests" in capsys.readouterr().err


BARE = """
import importlib, sys
for name in ("antlr4", "faiss", "iopath", "llvmlite", "matplotlib", "numba", "omegaconf", "pandas",
             "portalocker", "scipy", "sklearn", "tensorboard", "termcolor", "yacs"):
    sys.modules[name] = None  # importing it fails as on a machine without it
from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.sections import SECTIONS
for section in SECTIONS:
    if not section.missing():
        importlib.import_module(section.run.partition(":")[0])
        print(section.name)
parts.import_parts()
print(*parts.loss_specs())
"""


def test_what_a_bare_machine_can_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left_out = {section.name for section in SECTIONS} - {*done.stdout.split()}
    assert left_out == {"neighbours", "pseudo_labels", "ranking", "loading"}  # for want of numba
    assert "O2CAPLoss" in done.stdout


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    # More than a minute, for machines that are busy with other work.
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu", "--minutes", "10",
         "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / runner.JSON).read_text())
    statuses = {found["name"]: found["status"] for found in results["sections"]}
    assert statuses.keys() == {section.name for section in SECTIONS}
    assert {*statuses.values()} <= {"done", "cut short"}, done.stdout
    assert re.search(r"All \d+ checks hold", (tmp_path / runner.PAGE).read_text())
