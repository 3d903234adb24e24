from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reid.modeling.weights import (
    WeightsError,
    load_backbone_weights,
    load_checkpoint,
    load_weights,
    read_checkpoint,
    read_metadata,
    save_checkpoint,
    save_weights,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path, source, target = tmp_path / f"m.{suffix}", network(), network()
    if suffix == "pth":
        save_checkpoint(path, source.state_dict())
    else:
        save_weights(path, source.state_dict(), {"epoch": "3"})
    state, metadata = read_checkpoint(path)
    report = load_weights(target, state, source=str(path))
    assert len(report.loaded) == len(source.state_dict())
    assert not report.missing + report.unexpected + report.resized
    assert metadata == ({} if suffix == "pth" else {"epoch": "3"})
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "teacher"])
def test_wrappers_and_module_prefix(tmp_path: Path, wrapper: str) -> None:
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    save_checkpoint(tmp_path / "m.pth", {wrapper: state, "epoch": 3})
    load_weights(network(), read_checkpoint(tmp_path / "m.pth")[0])


def test_report_names_what_happened() -> None:
    state = dict(network().state_dict())
    del state["1.running_mean"]
    state["head.weight"] = torch.zeros(2)
    report = load_weights(network(), state, allow_missing=("1.running_*",))
    assert report.missing == ("1.running_mean",)
    assert report.unexpected == ("head.weight",)
    text = str(report)
    for part in ("loaded      ", "missing     1: 1.running_mean", "unexpected  1: head.weight"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"0.weight": torch.zeros(9, 3)},
            r"0\.weight: file \(9, 3\), model \(4, 3\)",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "0.bias"}, r"not in the file.*0\.bias"),
        (lambda s: s | {"0.bias": torch.full((4,), torch.nan)}, r"not finite.*0\.bias"),
        (lambda s: s | {"0.bias": torch.ones(4).double() * 1e300}, r"not finite.*0\.bias"),
        (
            lambda s: s | {"0.bias": torch.ones(4, dtype=torch.bool)},
            r"0\.bias: file torch\.bool, model torch\.float32",
        ),
        (lambda s: s | {"0.bias": torch.ones(4).to(torch.complex64)}, r"0\.bias: file torch\.comp"),
        (lambda s: {f"x.{k}": v for k, v in s.items()}, "no name fits the model"),
    ],
)
def test_all_or_nothing(change, message) -> None:  # type: ignore[no-untyped-def]
    target = network()
    before = values(target)
    with pytest.raises(WeightsError, match=message):
        load_weights(target, change(network().state_dict()), source="file.pth")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pth: there is no such"):
        read_checkpoint(tmp_path / "gone.pth")
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"cut.{suffix}"
        if suffix == "pth":
            save_checkpoint(path, network().state_dict())
        else:
            save_weights(path, network().state_dict(), {})
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(WeightsError, match=rf"cut\.{suffix}: is broken or cut off"):
            read_checkpoint(path)
    save_checkpoint(tmp_path / "empty.pth", {"epoch": 3})
    with pytest.raises(WeightsError, match=r"no tensors found.*the file has epoch"):
        read_checkpoint(tmp_path / "empty.pth")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(WeightsError, match=r"evil\.pth: .*could run code"):
        read_checkpoint(path)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"model": Evil()}, protocol))
        plain = r"evil\.pth: is a plain pickle \(pickle\.dump\), .*could run code"
        with pytest.raises(WeightsError, match=plain):
            read_checkpoint(path)


@pytest.mark.parametrize("new", [True, False])
def test_a_whole_network_in_a_file_is_named(tmp_path: Path, new: bool) -> None:
    torch.save(network(), tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(tmp_path / "m.pth")
    assert str(caught.value) == (
        f"{tmp_path / 'm.pth'}: holds more than plain tensors, such as "
        "torch.nn.modules.container.Sequential, and is not read since that could run code; where "
        "you trust it, save its state_dict(), or its tensors, with torch.save"
    )
    torch.save(values(network()), tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    assert len(read_checkpoint(tmp_path / "m.pth")[0]) == len(network().state_dict())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_checkpoint(path, {"epoch": 2, "bad": lambda: None})
    assert load_checkpoint(path) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]


def test_backbone_of_a_whole_model(tmp_path: Path) -> None:
    backbone = network()
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    save_weights(tmp_path / "m.safetensors", state | {"head.x": torch.zeros(1)}, {"epoch": "3"})
    report = load_backbone_weights(network(), tmp_path / "m.safetensors")
    assert report.unexpected == ("head.x",)
    assert report.metadata == {"epoch": "3"}


def test_numbers_of_other_libraries_are_passed_over(tmp_path: Path) -> None:
    content = {
        "state_dict": network().state_dict(),
        "best_mAP": np.float64(0.5),
        "args": argparse.Namespace(lr=np.float32(0.1), epochs=3),
    }
    torch.save(content, tmp_path / "m.pth")
    load_weights(network(), read_checkpoint(tmp_path / "m.pth")[0])
    with pytest.raises(WeightsError, match="could run code"):  # our own files have none
        load_checkpoint(tmp_path / "m.pth")
    torch.save(content | {"more": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="could run code"):
        read_checkpoint(tmp_path / "evil.pth")


def test_small_file_that_asks_for_much_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    save_checkpoint(path, {"w": torch.zeros(2**20)})
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    with pytest.raises(WeightsError, match=r"bomb\.pth.*records unpack to 4,\d+,\d+ bytes"):
        read_checkpoint(path)

    save_checkpoint(path, {"w": torch.zeros(1).expand(2**40)})
    for read in (read_checkpoint, load_checkpoint):
        with pytest.raises(WeightsError, match=r"bomb\.pth.*w \(1099511627776,\) has 4,398,"):
            read(path)

    class Zeros:
        def __reduce__(self) -> tuple[object, tuple[int]]:
            return bytearray, (2**20,)

    for new in (True, False):
        torch.save({"w": Zeros()}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(WeightsError, match=r"bomb\.pth.*builds a bytearray"):
            read_checkpoint(path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_odd_numbers_are_refused(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"odd.{suffix}"
    state = {"v": torch.ones(2), "w": torch.ones(2).to(dtype)}
    save_checkpoint(path, state) if suffix == "pth" else save_weights(path, state, {})
    with pytest.raises(WeightsError, match=rf"odd\.{suffix}: expected whole.*got w {dtype}$"):
        read_checkpoint(path)


def test_half_precision_becomes_float32() -> None:
    source, target = network(), network()
    load_weights(target, {name: value.bfloat16() for name, value in source.state_dict().items()})
    for name, value in source.state_dict().items():
        assert target.state_dict()[name].dtype == value.dtype
        assert torch.equal(target.state_dict()[name], value.bfloat16().to(value.dtype))


def test_a_tensor_that_cannot_be_resized_is_named() -> None:
    class Stubborn(nn.Linear):
        def resize_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            raise ValueError("no grid")

    with pytest.raises(WeightsError, match=r"f\.pth: tensors do not fit.*\n  weight: no grid"):
        load_weights(Stubborn(2, 2), {"weight": torch.zeros(3, 2)}, source="f.pth")


def test_tensors_without_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3, device="meta")}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd\.pth.*w is no plain tensor"):
        read_checkpoint(tmp_path / "odd.pth")


def test_metadata_are_told_by_content_whatever_the_file_is_called(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    save_weights(tmp_path / "a.safetensors", state, {"image_size": "[96, 48]"})
    renamed = (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert read_metadata(renamed) == {"image_size": "[96, 48]"}
    torch.save(state, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors") == {}
    (tmp_path / "cut.pt").write_bytes(renamed.read_bytes()[:40])
    with pytest.raises(WeightsError, match=r"cut\.pt: is broken or cut off"):
        read_metadata(tmp_path / "cut.pt")


def test_a_header_that_takes_long_is_refused_where_metadata_alone_is_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {str(number): "v" for number in range(400_000)}
    save_weights(path, {"a": torch.zeros(1)}, metadata)
    for read in (read_metadata, read_checkpoint):
        with pytest.raises(WeightsError, match="is refused: its header of"):
            read(path)
