from __future__ import annotations

import json
import logging
import os
import random
import re
import runpy
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from reid.structures import DataError
from reid.workflows import report
from reid.workflows import train as training
from reid.workflows.report import report_at_end, write_report
from reid.workflows.report.page import visible

MakeRun = Callable[..., Path]
EVIL = "<script>pwned=1</script>\"'><img src=x onerror=pwned=1>{{ 7 * 7 }}"
VOID = {"meta", "link", "img", "br", "use", "path", "rect"}


class Page(HTMLParser):
    """The tags and text of a page; checks that tags are closed in the right order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th", "li"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_a_page_shows_everything_of_a_run(make_run: MakeRun) -> None:
    found = page(make_run())
    text = squeezed(found.text)
    for words in (
        "finished after 3 epochs", "Results on Drawn", "70.0", "1,234", "after epoch 3",
        "Clusters split by camera: 41 % hold images of one camera only",
        "raise CLUSTERER.EPS (now 0.5)", "agreement", "outliers", "triplet",
        "Hardest queries", "AP 5.0 %", "mAP in percent", "80",
        "The final model finds 2 clusters among 5 images; 1 are in none.",
        "Cluster 1: 2 images, 1 cameras, confidence 0.15", "similarity 0.987, cluster 0",
        "first of all", "c0ffee with changes", "3.11.7 on Linux", "TEMPERATURE: 0.07",
        "git checkout c0ffee", "tools/train_net.py --config-file",
    ):  # fmt: skip
        assert words in text, words
    pictures = [attrs for tag, attrs in found.tags if tag == "img"]
    assert len(pictures) == 3 + 2 + 4 + 2  # sheets, queries, clusters, a pair
    assert all(str(attrs["src"]).startswith("data:image/jpeg;base64,") for attrs in pictures)
    assert len([1 for tag, attrs in found.tags if attrs.get("class") == "chart"]) > 10


def test_a_page_needs_nothing_else(make_run: MakeRun) -> None:
    found = page(make_run())
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    for _, attrs in found.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert str(value).startswith(("data:", "#")), value
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [str(attrs["href"])[1:] for tag, attrs in found.tags if tag == "a"]
    assert {*links} <= {*ids}


def test_names_do_not_become_html(make_run: MakeRun) -> None:
    controls = "\x1b]0;x\x07\u202egnp.\udce9"
    folder = make_run(
        EVIL.replace("/", "_"),
        images="{}" + EVIL.replace("/", "_") + controls,
        test_set=EVIL,
        loss=EVIL,
        CLUSTERER={"NAME": EVIL},
    )
    (folder / "log.txt").write_bytes(
        b"1-1 \n11-27 10:00:00  Environment\n" + EVIL.encode() + b"  x\n11-27 10:00:00  Config\n"
        b"11-27 10:00:01  WARNING: \x1b[31m" + EVIL.encode() + b"\xff\n"
    )
    raw = write_report(folder).read_bytes()
    text = raw.decode("utf-8")  # bytes in names that are not UTF-8 are escaped
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", text)
    found = Page(text)
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [attrs for _, attrs in found.tags if "onerror" in attrs]
    assert "{{ 7 * 7 }}" in found.text
    assert r"\x1b]0;x\x07\u202egnp.\xe9" in text
    assert found.text.count("pwned=1") > 10
    assert len([1 for tag, _ in found.tags if tag == "img"]) == 3 + 2 + 4 + 2


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("results.json", "results.json has no details about queries and cameras."),
        ("config.yaml", "config.yaml is missing"),
        ("metrics.json", "metrics.json has nothing of this."),
        ("log.txt", "2.6"),
        ("clusters.csv", "There is no clusters.csv: add WriteClusters to HOOKS"),
        ("pictures", "There is no ranked_lists.png in the run's folder."),
    ],
)
def test_the_page_says_which_files_are_missing(make_run: MakeRun, without: str, words: str) -> None:
    assert words in squeezed(page(make_run(without=(without,))).text)


def test_a_killed_run(make_run: MakeRun) -> None:
    folder = make_run(finished=False, SOLVER={"MAX_EPOCHS": 50})
    text = squeezed(page(folder).text)
    assert "ended in or after epoch 3 of 50; log.txt does not say why" in text
    assert "which this run has not reached" in text
    assert "Only the last evaluation has queries and cameras, and this run has not rea" in text
    assert f"--config-file {folder}/config.yaml --resume OUTPUT_DIR {folder}" in text
    assert "70.0" in text  # from metrics.json
    with (folder / "log.txt").open("a") as log:
        log.write("11-27 10:00:02  ERROR: stopped by Interrupted: SIGTERM\n")
    assert "stopped by Interrupted: SIGTERM" in page(folder).text


@pytest.mark.parametrize(
    "hooks", [["WriteClusters"], [{"NAME": "WriteClusters", "NUM_MATCHES": 9}]]
)
def test_a_killed_run_would_have_written_its_clusters(make_run: MakeRun, hooks: object) -> None:
    text = page(make_run(finished=False, HOOKS=hooks, SOLVER={"MAX_EPOCHS": 50})).text
    assert "add WriteClusters" not in text
    assert "There is no clusters.csv: it is written at the end" in text
    assert "There is no matches.png: it is drawn at the end" in text


def test_a_run_killed_at_once(make_run: MakeRun) -> None:
    text = squeezed(page(make_run(finished=False, without=("metrics.json",))).text)
    assert "ended before the first epoch" in text
    assert "There are too few numbers to judge by." in text
    assert "This run was not evaluated before it ended." in text


def test_no_test_set_and_no_clusterer(make_run: MakeRun) -> None:
    folder = make_run(without=("results.json", "pictures"), CLUSTERER=None)
    lines = (folder / "metrics.json").read_text().splitlines()
    (folder / "metrics.json").write_text("\n".join(x for x in lines if '"test"' not in x))
    text = squeezed(page(folder).text)
    assert "This run was not evaluated: it has no test set (DATASETS.TEST)." in text
    assert "Labels are the identities: there are no clusters." in text
    assert "There is no ranked_lists.png: this run has no test set." in text


def test_unreadable_images_are_named(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "2.png").unlink()
    (folder / "0.png").write_text("no picture")
    os.mkfifo(folder / "pipe")
    clusters = folder / "clusters.csv"
    clusters.write_text(clusters.read_text().replace(str(folder / "3.png"), str(folder / "pipe")))
    (folder / "clusters.png").write_bytes(b"PNG")
    found = page(folder)
    assert "3 images cannot be read here; the first: " in found.text
    assert "clusters.png cannot be read: " in found.text
    assert found.text.count("no picture") >= 3


NASTY = (
    None, True, -1, 10**400, 2**63, float("nan"), float("inf"), -1e308, "", "x\ud800\x00<", [], {},
    [[]], [None], {"a": 1}, "1e5",
)  # fmt: skip


def mutated(value: Any, rng: random.Random, share: float) -> Any:
    """JSON with some values replaced and some keys removed."""
    if rng.random() < share:
        return rng.choice(NASTY)
    if isinstance(value, dict):
        return {k: mutated(v, rng, share) for k, v in value.items() if rng.random() > share / 2}
    return [mutated(item, rng, share) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(12))
def test_any_values_make_a_page(make_run: MakeRun, seed: int) -> None:
    rng = random.Random(seed)
    share = rng.choice([0.02, 0.1, 0.3])
    folder = make_run(finished=True)
    (folder / "config.yaml").write_text(
        json.dumps(mutated(yaml.safe_load((folder / "config.yaml").read_text()), rng, share))
    )
    results = mutated(json.loads((folder / "results.json").read_text()), rng, share)
    (folder / "results.json").write_text(json.dumps(results))
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    changed = [json.dumps(mutated(line, rng, share)) for line in lines]
    (folder / "metrics.json").write_text("\n".join(changed))
    page(folder)


def test_a_matrix_of_many_cameras_is_cut(make_run: MakeRun) -> None:
    folder = make_run()
    results = json.loads((folder / "results.json").read_text())
    cameras = [*range(100)]
    table = [[0.5] * 100 for _ in cameras]
    results["final"][0]["camera_pairs"] = {
        "query_cameras": cameras, "gallery_cameras": cameras, "mAP": table,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    found = page(folder)
    assert "The first 40 of 100 cameras." in found.text
    assert len([1 for _, attrs in found.tags if attrs.get("class") == "heat"]) == 1600


@pytest.mark.parametrize("runs", [1, 2])
def test_pages_of_large_pictures_stay_small(make_run: MakeRun, runs: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (800, 700, 3), dtype=np.uint8)
    folders = [make_run(f"run{i}") for i in range(runs)]
    for folder in folders:
        for name in ("ranked_lists", "clusters", "similarities", "matches"):
            Image.fromarray(noise).save(folder / f"{name}.png", compress_level=0)
    size = write_report(folders, folders[0] / "page.html").stat().st_size
    assert 1e6 < size < 3e6


def test_a_picture_without_room_is_named(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reid.workflows.report.page._PICTURE_BYTES", 3000)
    folder = make_run()
    assert f"ranked_lists.png has no room on this page: look at {folder}" in page(folder).text


def test_runs_side_by_side_show_their_differences_first(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_run("one"), make_run("other", CLUSTERER={"NAME": "KMeans", "NUM_CLUSTERS": 9})
    (other / "log.txt").unlink()
    monkeypatch.chdir(tmp_path)
    assert write_report([one, other]) == Path("report.html")
    found = Page(Path("report.html").read_text("utf-8"))
    text = squeezed(found.text)
    assert "2 runs side by side" in text
    settings = text[text.index("Differences of settings") : text.index("Results on Drawn, %")]
    assert "CLUSTERER.NAME JaccardDBSCAN KMeans" in settings
    assert "CLUSTERER.EPS 0.5 - " in settings
    assert "CLUSTERER.NUM_CLUSTERS - 9" in settings
    assert "BASE_LR" not in settings
    charts = [attrs for _, attrs in found.tags if attrs.get("class") == "chart"]
    assert len(charts) < 25  # one for both


def test_equal_runs_get_different_names(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = make_run("a/run"), make_run("b/run", OUTPUT_DIR="elsewhere")
    write_report([one, other], tmp_path / "new" / "page.html")
    text = squeezed(Page((tmp_path / "new" / "page.html").read_text("utf-8")).text)
    assert "All settings on which results depend are the same." in text
    assert "Settings that do not change results (1)" in text
    assert text.count(f"{tmp_path}/b/run") > 3
    write_report([one, one], tmp_path / "page.html")
    assert f"{one} (2)" in (tmp_path / "page.html").read_text("utf-8")


def test_the_tool(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tool = Path(__file__).parents[3] / "tools" / "report.py"

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(tool), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return stop.value.code

    folder = make_run()
    assert run(folder) == 0
    assert capsys.readouterr().out == f"Written to {folder}/report.html\n"
    assert (folder / "report.html").is_file()
    assert run(tmp_path / "none") == 2
    assert "DataError: " in capsys.readouterr().err
    assert run(folder, "--output", folder / "log.txt" / "page.html") == 2
    assert "OutputError: " in capsys.readouterr().err


def test_a_run_succeeds_even_if_its_page_cannot_be_made(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run()
    (folder / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, "reid"):
        report_at_end(folder)
    assert "no report.html: " in caplog.text
    assert str(folder / "report.html") in caplog.text
    monkeypatch.setattr("reid.distributed.rank", lambda: 1)
    monkeypatch.setattr(report, "write_report", lambda _: pytest.fail("not the main process"))
    report_at_end(folder)
    assert training.REPORT in training._FILES


def test_no_run_is_refused() -> None:
    with pytest.raises(DataError, match="got none"):
        write_report([])


def test_visible() -> None:
    assert visible("plain ü\n") == "plain ü\n"
    assert visible("\x00\u200b\udcff\U000e0001") == r"\x00\u200b\xff\U000e0001"
    assert visible(3) == 3
