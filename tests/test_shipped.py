"""The command `reid`, short names of configs, and a wheel that works without the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import reid
from reid import __main__ as program
from reid import shipped
from reid.config import load_config
from reid.registry import ConfigError

ROOT = Path(__file__).parents[1]
SMALL = ["DATASETS.TRAIN.NUM_TRAIN", "8", "DATASETS.TRAIN.NUM_TEST", "4",
         "DATASETS.TRAIN.NUM_CAMERAS", "3", "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2",
         "SOLVER.MAX_EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0",
         "SOLVER.MILESTONES", "[]"]  # fmt: skip
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process; gives its exit code."""

    def called(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["reid", *words])
        return program.main()

    return called


def test_every_tool_is_a_command_and_help_says_what_each_does(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = {file.stem for file in (ROOT / "tools").glob("*.py")} - {"submit"}  # runs the checkout
    assert set(shipped.COMMANDS.values()) == tools
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for word in shipped.COMMANDS:
        assert re.search(rf"^  {word} +[A-Z].*\.$", shown, re.MULTILINE)


def test_an_unknown_command_is_told_with_a_hint(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("trian") == 2
    assert "there is no command 'trian' (did you mean 'train'?)" in capsys.readouterr().err


def test_the_version(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"reid {reid.__version__}\n"


def test_a_command_is_its_tool(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("evaluate", "--help")
    assert capsys.readouterr().out.startswith("usage: reid evaluate ")


def test_examples_in_the_help_of_a_command_are_commands(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("search", "--help")
    shown = capsys.readouterr().out
    assert "reid search build people crops/ --model logs/run" in shown
    assert "python tools/" not in shown


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tmgf/demo.yaml", "projects/TMGF/configs/demo.yaml"),
        ("TMGF/demo.yaml", "projects/TMGF/configs/demo.yaml"),
        ("transreid_ssl/usl_msmt.yaml", "projects/TransReID_SSL/configs/usl_msmt.yaml"),
        ("own_cameras.yaml", "configs/own_cameras.yaml"),
        ("configs/comparison/o2cap.yaml", "configs/comparison/o2cap.yaml"),
    ],
)
def test_short_names_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find_config(name) == ROOT / file
    assert load_config(name).sources[0] == ROOT / file


def test_a_file_of_the_working_directory_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmgf").mkdir()
    (tmp_path / "tmgf" / "demo.yaml").write_text("SEED: 77")
    assert load_config("tmgf/demo.yaml").seed == 77


def test_a_short_name_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'tmgf/dem.yaml' does not exist .*'tmgf/demo.yaml'"):
        load_config("tmgf/dem.yaml")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "../../setup.py"])
def test_names_that_no_file_has_are_left_as_they_are(name: str) -> None:
    assert shipped.find_config(name) == Path(name)


def test_commands_that_are_printed_fit_where_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shipped.command("train_net") == ["python", "tools/train_net.py"]
    monkeypatch.setattr(shipped, "_CHECKOUT", Path("/nowhere"))
    assert shipped.command("train_net") == ["reid", "train"]
    several = ["torchrun", "--nproc-per-node", "2", "-m", "reid", "train"]
    assert shipped.command("train_net", 2) == several


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"  # building leaves files behind
    listed = ["git", "ls-files", "-zco", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=False)
    if names.returncode:
        pytest.skip("the tests are not in a git repository")
    for name in filter(None, names.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run(
        [sys.executable, "-m", *build, str(folder), str(copy)], check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def run_installed(installed: Path, work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    work.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed), "REID_DATASETS": str(work / "data")}
    return subprocess.run(
        [sys.executable, "-m", "reid", *words],
        cwd=work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_wheel_holds_all_that_commands_need(installed: Path, tmp_path: Path) -> None:
    shown = run_installed(installed, tmp_path, "--help")
    assert shown.returncode == 0, shown.stderr
    assert all(f"  {word} " in shown.stdout for word in shipped.COMMANDS)
    wanted = ["configs/**/*.yaml", "projects/*/configs/**/*.yaml", "projects/*/tables.yaml",
              "projects/*/weights/*.safetensors"]  # fmt: skip
    for pattern in wanted:
        files = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))
        assert files
        for file in files:
            assert (installed / "reid" / "shipped" / file).read_bytes() == (
                ROOT / file
            ).read_bytes()
    for pattern in ("reid/**/*.j2", "reid/**/static/*", "reid/**/py.typed"):
        files = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))
        assert files
        assert all((installed / file).is_file() for file in files)
    wrong = run_installed(installed, tmp_path, "train", "--config-file", "tmgf/dem.yaml")
    assert wrong.returncode == 2
    assert "did you mean 'tmgf/demo.yaml'" in wrong.stderr


@pytest.mark.slow
def test_a_wheel_trains_without_the_repository(installed: Path, tmp_path: Path) -> None:
    trained = run_installed(installed, tmp_path, "train", "--config-file", "tmgf/demo.yaml", *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "logs" / "demo" / "model_final.safetensors").is_file()
    page = (tmp_path / "logs" / "demo" / "report.html").read_text()
    assert "reid train --config-file" in page
    assert "tools/train_net.py" not in page


def test_messages_name_the_tool_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped.tool("thresholds") == "tools/thresholds.py"
    monkeypatch.setattr(shipped, "is_checkout", lambda: False)
    assert shipped.tool("thresholds") == "reid thresholds"
    assert shipped.tool("check_data") == "reid check-data"
