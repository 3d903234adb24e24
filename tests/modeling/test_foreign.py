from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from reid.modeling import screening
from reid.modeling.weights import (
    WeightsError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return stream.getvalue()


def tar(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        file.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def numpy_file(save: object) -> bytes:
    stream = io.BytesIO()
    save(stream, np.zeros(3))  # type: ignore[operator]
    return stream.getvalue()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("m.pth", b"", r"is empty \(0 bytes\); a copy or download failed"),
    ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
     "is a Git LFS pointer, not the file that it stands for; run `git lfs pull`"),
    ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("m.pth", b"/annex/objects/SHA256E-s1--0.pth\n", "is a git-annex pointer"),
    ("m.pth", b"outs:\n- md5: 0\n  size: 1\n", "is a DVC pointer.*`dvc pull`"),
    ("m.pth", b"\n<!doctype html><html>", "is a web page, .*; open the address in a browser"),
    ("m.pth", b'<?xml version="1.0"?><Error><Code>NoSuchKey', "is the error message of a server"),
    ("m.pth", b'{"error": "Not found"}', "is the error message of a server"),
    ("m.pth", b"Invalid username or password.", "is text that starts with 'Invalid username"),
    ("m.pth", b'{"metadata": {}, "weight_map": {"a": "1.safetensors"}}', "the index of a check"),
    ("m.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff", "is an ONNX model; it is made for"),
    ("m.pth", b"\x08\x07:\xff\x01\n", "is an ONNX model; .* use the checkpoint that it was made"),
    ("m.xml", b'<?xml version="1.0"?>\n<net name="m" version="11">', "is an OpenVINO model"),
    ("saved.pb", b"\x08\x01\x12\xb4\x80\x01\x0a\x10", "is a TensorFlow model"),
    ("frozen.pb", b"\x0a\x1e\x0a\x05input\x12\x0b", "is a TensorFlow model by its name"),
    ("m.ckpt.data-00000-of-00001", bytes(range(99)), "is a TensorFlow model by its name"),
    ("checkpoint", b'model_checkpoint_path: "m"\n', "is a TensorFlow model"),
    ("m.tflite", b"\x1c\0\0\0TFL3\0\0", "is a TensorFlow Lite model"),
    ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file, as Keras and MATLAB write"),
    ("m.keras", archive(config_dot_json=b"{}", model_dot_weights_dot_h5=b""), "Keras or Tens"),
    ("m.mlmodel", b"\x08\x05\x12\x20\x0a\x10", "is a Core ML model"),
    ("m.engine", b"ftrt" + bytes(9), "is a TensorRT model"),
    ("m.gguf", b"GGUF\3\0\0\0", "is a GGUF model"),
    ("m.caffemodel", b"\x0a\x08ResNet\xff", "is a Caffe model by its name"),
    ("m.pth", archive(weights__a_dot_pth=b"x", readme_dot_txt=b""),
     r"is a zip archive; unpack it and name the file in it: weights/a\.pth$"),
    ("m.pth", archive(readme_dot_txt=b""), r"is a zip archive without weights in it: readme\.txt"),
    ("m.pth", archive(), "is a zip archive without weights in it: nothing"),
    ("m.pt", archive(m__data_dot_pkl=b"", m__constants_dot_pkl=b"", m__code__x_dot_py=b""),
     r"is a TorchScript model.*save torch\.jit\.load\(FILE\)\.state_dict\(\) with torch\.save"),
    ("m.pt2", archive(m__archive_format=b"pt2", m__models__model_dot_json=b"{}"), "torch.export"),
    ("m.mar", archive(**{"MAR-INF__MANIFEST_dot_json": b"", "m_dot_pth": b""}),
     r"an archive of TorchServe; unpack it and name the file in it: m\.pth"),
    ("m.npz", numpy_file(np.savez), r"is an archive of NumPy \(\.npz\)"),
    ("m.npy", numpy_file(np.save), r"is an array of NumPy \(\.npy\), not a checkpoint"),
    ("m.pth.gz", b"\x1f\x8b\x08" + bytes(9), "is a gzip archive; unpack it, and name the file"),
    ("m.7z", b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive; unpack it"),
    ("m.tar", tar("m.pth"), "is a tar archive; unpack it"),
    ("m.pth", b"\xff\xd8\xff\xe0" + bytes(9), "is a JPEG picture, not a checkpoint"),
])  # fmt: skip
def test_errors_name_the_kind_of_file(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_checkpoint, load_checkpoint):
        with pytest.raises(WeightsError, match=message) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: is ")


def test_weights_of_openvino_are_known_by_their_neighbour(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(bytes(range(200)))
    (tmp_path / "m.xml").write_text('<net name="m">')
    with pytest.raises(WeightsError, match=r"m\.bin: is the weights of an OpenVINO model"):
        read_checkpoint(tmp_path / "m.bin")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning")
def test_real_files_of_torch_are_told_apart(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    torch.jit.script(net).save(str(tmp_path / "script.pt"))
    with pytest.raises(WeightsError, match=r"script\.pt: is a TorchScript model"):
        read_checkpoint(tmp_path / "script.pt")
    torch.save(net.state_dict(), tmp_path / "new.pth")
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "old.pth"):
        assert set(read_checkpoint(tmp_path / name)[0]) == {"weight", "bias"}


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2)}
    (tmp_path / "m.pth").write_bytes(save(state, {"epoch": "3"}))
    torch.save(state, tmp_path / "m.safetensors")
    assert read_checkpoint(tmp_path / "m.pth")[1] == {"epoch": "3"}
    assert torch.equal(read_checkpoint(tmp_path / "m.safetensors")[0]["weight"], torch.ones(2))


def test_folders_are_named(tmp_path: Path) -> None:
    for names, message in (
        (
            ("archive/data.pkl", "archive/version"),
            "is the folder of a checkpoint that a browser unpacked",
        ),
        (("data.pkl", "data/0"), "that a browser unpacked; .*zip -0 -r"),
        (("config.json", "model.safetensors"), r"a folder, .*name the file in it: model\.safetens"),
        (("saved_model.pb", "variables/x"), "is the folder of a TensorFlow model"),
        ((), "is a folder, expected a checkpoint file without weights in it: nothing"),
    ):
        folder = tmp_path / str(len(message))
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        with pytest.raises(WeightsError, match=message):
            read_checkpoint(folder)


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name, kind in (("pipe.pth", "pipe"), ("zero.safetensors", "device")):
        with pytest.raises(WeightsError, match=rf"{name}: is a {kind}, expected a regular file"):
            read_checkpoint(tmp_path / name)


def long_header() -> bytes:
    """A safetensors file with a header of more than 4 MiB."""
    header = json.dumps({"__metadata__": {"k": "v" * 2**22}}).encode()
    return struct.pack("<Q", len(header)) + header


def pickled(count: int) -> bytes:
    """A checkpoint of empty tensors that share one storage."""
    one = torch.zeros(1)
    stream = io.BytesIO()
    torch.save({i: one[:0] for i in range(count)}, stream)  # noqa: C420  (each its own)
    return stream.getvalue()


def million_records() -> bytes:
    """The end of a zip64 archive that claims a long list of records."""
    first = archive(m__data_dot_pkl=b"\x80\x02}.")[:-22]
    large = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 9, 9, 2**30, 0)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, len(first), 1)
    old = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return first + large + locator + old


@pytest.mark.parametrize(("content", "message"), [
    (long_header(), r"its header of 4,194,331 bytes is too long: 4,194,304 are read"),
    (pickled(201), "it has more than 200 tensors"),
    (pickled(600), "its pickle has more than 8,000 steps, which is more than 50,000 tensors"),
    (million_records(), "its list of records has 1,073,741,824 bytes"),
])  # fmt: skip
def test_millions_of_empty_records_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(screening, "MOST_TENSORS", 200 if "200" in message else 50_000)
    monkeypatch.setattr(screening, "_MOST_STEPS", 8000)
    (tmp_path / "m.pth").write_bytes(content)
    for read in (read_checkpoint, load_checkpoint) if content[:2] == b"PK" else (read_checkpoint,):
        with pytest.raises(WeightsError, match=rf"m\.pth: is refused: {message}"):
            read(tmp_path / "m.pth")


def test_the_bounds_leave_room_for_real_checkpoints() -> None:
    assert screening.MOST_TENSORS == 50_000
    assert screening._MOST_STEPS == 2_000_000


def test_many_tensors_are_read(tmp_path: Path) -> None:
    state = {f"layer{i}.weight": torch.ones(1) for i in range(500)}
    save_checkpoint(tmp_path / "m.pth", state)
    save_weights(tmp_path / "m.safetensors", state, {f"note{i}": "v" for i in range(100)})
    for name in ("m.pth", "m.safetensors"):
        assert len(read_checkpoint(tmp_path / name)[0]) == 500
