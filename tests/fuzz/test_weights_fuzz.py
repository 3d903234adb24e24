"""Hostile checkpoints give plain tensors or a `WeightsError`, and run nothing."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from reid.modeling.convert import convert_weights
from reid.modeling.weights import (
    WeightsError,
    load_checkpoint,
    load_weights,
    read_checkpoint,
    read_tensors,
)

HUGE = 2**40


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


EVIL = (
    Call(os.system, "touch canary"),
    Call(eval, "open('canary', 'w')"),
    Call(exec, "open('canary', 'w')"),
    Call(open, "canary", "w"),
    Call(os.mkdir, "canary"),
    Call(__import__, "antigravity"),
    Call(bytearray, 2**32),
    Call(torch.FloatTensor, HUGE),
    Call(list, range(10)),
    Call(zipfile.ZipFile, "canary", "w"),
)


def content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": OrderedDict(
            (f"blocks.{block}.{name}.{kind}", torch.randn(shape, generator=generator))
            for block in range(2)
            for name in ("norm1", "attn.qkv")
            for kind, shape in (("weight", (6, 3)), ("bias", (6,)))
        ),
        "epoch": 3,
        "metrics": {"mAP": 0.5, "best": [1, 2.0, "three", None, True]},
        "counter": torch.arange(4),
    }


def zip_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def legacy_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", "../canary"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return buffer.getvalue()


def edited(
    content: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip file with its records changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def encoded_over_and_over(times: int) -> bytes:
    """A pickle that doubles some bytes by writing them as hexadecimal digits, again and again."""
    inner = b"c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x06\x00\x00\x00latin1\x86R"
    for _ in range(times):
        inner = b"c_codecs\nencode\n" + inner + b"X\x03\x00\x00\x00hex\x86R"
    return b"\x80\x02}X\x01\x00\x00\x00w" + inner + b"s."


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def pickles() -> list[bytes]:
    """Valid files and made-up ones."""
    whole = zip_bytes(content())
    single = zip_bytes({"w": torch.arange(8.0)})
    sizes = struct.pack("<i", 2**28)

    def swap(*pairs: tuple[bytes, bytes]) -> bytes:
        def change(name: str, record: bytes) -> bytes:
            for old, new in pairs:
                record = record.replace(old, new) if name.endswith(".pkl") else record
            return record

        return edited(single, change)

    def only(record: bytes) -> bytes:
        return edited(single, lambda name, old: record if name.endswith(".pkl") else old)

    nested: object = torch.zeros(2)
    for _ in range(150):
        nested = [nested, nested]
    lists = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    return [
        whole,
        legacy_bytes(content()),
        *(save_as(of_dtype(dtype)) for dtype in DTYPES for save_as in (zip_bytes, legacy_bytes)),
        zip_bytes({"model": content()["model"], "args": argparse.Namespace(lr=1)}),
        zip_bytes({"state_dict": {f"module.{k}": v for k, v in content()["model"].items()}}),
        zip_bytes({"w": torch.zeros(2), "nested": nested}),
        zip_bytes({"w": torch.zeros(1).expand(HUGE)}),
        legacy_bytes({"w": torch.zeros(1).expand(HUGE)}),
        zip_bytes({"w": torch.zeros(HUGE, device="meta")}),
        zip_bytes({"w": torch.zeros(3, 3).to_sparse()}),
        zip_bytes({f"blocks.{HUGE}.norm1.weight": torch.zeros(2), "cls_token": torch.zeros(2)}),
        zip_bytes({f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(2)}),
        zip_bytes({"net.norm.bias": torch.zeros(2), "camera_embed": torch.ones(())}),
        zip_bytes(
            {f"backbone.{name}conv1.weight": torch.ones(1) for name in ("", "layer1.0.")}
            | {"heads.pool_layer.p": torch.ones(3)}
        ),
        zip_bytes([torch.zeros(2)]),
        zip_bytes({}),
        edited(zip_bytes({"w": torch.zeros(2**23)}), lambda _, old: old, zipfile.ZIP_DEFLATED),
        swap((b"K\x08\x85", b"J" + sizes + b"\x85")),
        swap((b"K\x08\x85", b"J" + sizes + b"\x85"), (b"K\x01\x85", b"K\x00\x85")),
        swap((b"K\x08tq", b"J" + sizes + b"tq")),
        swap((b"K\x08", b"J\xff\xff\xff\xff")),
        swap((b"K\x00K", b"J\x00\xff\xff\xffK")),
        swap((b"FloatStorage", b"DoubleStorage")),
        swap((b"FloatStorage", b"ByteStorage")),
        swap((b"FloatStorage", b"UntypedStorage")),
        only(encoded_over_and_over(36)),
        only(lists),
        only(b"\x80\x02X\xff\xff\xff\xffabc."),
        only(b"\x80\x02K\x01Q."),
        only(b"\x80\x02}."),
        lists,
        b"",
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\0" * 18,
        tar_bytes(),
        *(zip_bytes({"w": torch.zeros(2), "x": evil}) for evil in EVIL),
        *(legacy_bytes({"w": torch.zeros(2), "x": {"y": [evil]}}) for evil in EVIL),
        *(pickle.dumps({"w": evil}, protocol) for evil in EVIL for protocol in (0, 2, 4)),
    ]


def safetensors() -> list[bytes]:
    """Valid files and made-up ones."""
    state = content()["model"]
    one = struct.pack("<4f", 1, 2, 3, 4)
    made_up = [
        header(w=entry("F32", [4], 0, 16)) + one,
        header(w=entry("F32", [4], 0, 16), v=entry("F32", [4], 0, 16)) + one,
        header(w=entry("F32", [2], 0, 8), v=entry("F32", [2], 4, 12)) + one,
        header(w=entry("F32", [2**32, 2**32], 0, 16)) + one,
        header(w=entry("F32", [HUGE], 0, 4 * HUGE)) + one,
        header(w=entry("F32", [-4], 0, 16)) + one,
        header(w=entry("F64", [4], 0, 16)) + one,
        header(w=entry("I4", [4], 0, 16)) + one,
        header(w=entry("F4", [32], 0, 16)) + one,
        header(w=entry("F32", [4], 16, 0)) + one,
        header(w=entry("F32", [0, HUGE], 0, 0)),
        header(w={"dtype": "F32"}) + one,
        header(__metadata__={"epoch": 3}, w=entry("F32", [4], 0, 16)) + one,
        header(__metadata__={"format": "pt"}),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 2) + b"{}",
        b"",
        b"\0" * 8,
    ]
    typed = [save(of_dtype(dtype)) for dtype in DTYPES]
    return [save(state), save(state, {"epoch": "3"}), *typed, *made_up]


DTYPES = (
    torch.bool, torch.uint8, torch.int64, torch.uint16, torch.float16, torch.bfloat16,
    torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def of_dtype(dtype: torch.dtype) -> dict[str, Tensor]:
    """The content with one tensor of another dtype."""
    state = content()["model"]
    state["blocks.1.norm1.bias"] = state["blocks.1.norm1.bias"].abs().to(dtype)
    return state


def target() -> torch.nn.Module:
    """A module with the names and shapes of `content`."""
    blocks = [
        torch.nn.ModuleDict({
            "norm1": torch.nn.Linear(3, 6),
            "attn": torch.nn.ModuleDict({"qkv": torch.nn.Linear(3, 6)}),
        })
        for _ in range(2)
    ]  # fmt: skip
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(blocks)})


def written(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def check_plain(state: dict[str, Tensor], path: Path) -> None:
    """Checks that the tensors can be used, and take no more memory than the file."""
    assert state
    for name, tensor in state.items():
        assert isinstance(name, str)
        assert isinstance(tensor, Tensor)
        assert tensor.numel() * tensor.element_size() <= path.stat().st_size
        tensor.clone().sum()  # this fails if the size is a lie


def read_all_ways(path: Path) -> str:
    state, _ = read_tensors(path)
    check_plain(state, path)
    renamed, _ = read_checkpoint(path)
    check_plain(renamed, path)
    module = target()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        load_weights(module, renamed, source=str(path))
    except WeightsError:
        assert_same(module.state_dict(), before)
    else:
        assert all(renamed[name].dtype in FLOATS for name in before)
        assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    with contextlib.suppress(WeightsError):  # no known format
        convert_weights(path, path.with_name("converted.safetensors"), partial=True)
    return "accepted"


def pick(rng: random.Random, seed_files: list[bytes], mutate: Callable[..., bytes]) -> bytes:
    """One of the files, unchanged or mutated; valid files are mutated most often."""
    chosen = rng.choice((*seed_files[:2] * (len(seed_files) // 2), *seed_files))
    return chosen if rng.random() < 0.15 else mutate(chosen, rng, seed_files[:2])


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_made_up_weights(fuzz: Callable[..., Counter[str]], kind: str) -> None:
    files = pickles() if kind == "pth" else safetensors()

    def case(number: int, folder: Path) -> str:
        return read_all_ways(written(files[number], folder / f"hostile.{kind}"))

    outcomes = fuzz(case, range(len(files)), WeightsError)
    assert outcomes["accepted"] >= 2
    assert outcomes["refused"] >= len(files) // 2


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_changed_weights(
    fuzz: Callable[..., Counter[str]],
    seeds: range,
    mutated: Callable[..., bytes],
    kind: str,
) -> None:
    files = pickles() if kind == "pth" else safetensors()

    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        return read_all_ways(written(pick(rng, files, mutated), folder / f"hostile.{kind}"))

    assert set(fuzz(case, seeds, WeightsError)) == {"accepted", "refused"}


def test_changed_training_checkpoints(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    """With checksums verified, a checkpoint is read exactly as written or not at all."""
    files = pickles()

    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            path = written(pick(rng, files, mutated), folder / "hostile.pth")
            load_checkpoint(path)
            return "accepted"
        path = written(mutated(files[0], rng), folder / "hostile.pth")
        found = load_checkpoint(path, verify=True)
        assert_same(found, content())
        return "accepted"

    assert set(fuzz(case, seeds, WeightsError)) == {"accepted", "refused"}


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert found == expected
