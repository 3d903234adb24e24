"""Hostile lists, features and pictures give their content, or a `DataError` that names the file."""

from __future__ import annotations

import io
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from PIL import Image

from reid.data.datasets.csv_dataset import read_csv
from reid.data.images import read_image
from reid.evaluation.feature_files import load_features
from reid.evaluation.mapped_features import copy_features, map_features, read_camids
from reid.structures import DataError

LISTS = (
    b"path,pid,camid,split\na.jpg,1,0,train\nb.jpg,,,query\nc.jpg,-1,1,gallery\n",
    'path;camid;note\n"a;b.jpg";1;"caf\u00e9"\n'.encode(),
    b"\xef\xbb\xbfpath\tpid\r\nx/y.png\t12\r\n",
)
WRONG_LISTS = (
    b"",
    b"\0",
    b"path\n",
    b"path,path\na,b\n",
    b"path,pid\na.jpg,1,2\n",
    b"path,pid\na.jpg\n",
    b"path\n../a.jpg\n",
    b"path\n/etc/passwd\n",
    b"path\nx/../../a.jpg\n",
    b"path\na\0b.jpg\n",
    b'path\n"a.jpg\n',
    b"path,pid\na.jpg," + b"9" * 5000 + b"\n",
    b"path,pid\na.jpg,1e3\n",
    "path,pid\na.jpg,\N{ARABIC-INDIC DIGIT ONE}\n".encode(),
    b"path,split\na.jpg,tset\n",
    b"path," * 50_000 + b"\n",
    b'path\n"' + b"x" * 200_000 + b'"\n',
    b"\xff\xfep\0a\0t\0h\0",
)


def test_made_up_lists(fuzz: Callable[..., Counter[str]]) -> None:
    def case(number: int, folder: Path) -> str:
        path = folder / "list.csv"
        path.write_bytes((*LISTS, *WRONG_LISTS)[number])
        read_csv(path)
        return f"accepted {number}"

    right = {f"accepted {number}": 1 for number in range(len(LISTS))}
    outcomes = fuzz(case, range(len(LISTS) + len(WRONG_LISTS)), DataError)
    assert outcomes == {**right, "refused": len(WRONG_LISTS)}


def test_changed_lists(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        path = folder / "list.csv"
        path.write_bytes(mutated(rng.choice(LISTS), rng, (*LISTS, *WRONG_LISTS[:15])))
        for split, record in read_csv(path):
            assert split in ("train", "query", "gallery")
            assert record.pid >= -1
            assert record.camid >= -1
            # Whatever the list says, images outside its folder are refused.
            assert Path(record.path).is_relative_to(folder)
            assert ".." not in Path(record.path).parts
        return "accepted"

    assert set(fuzz(case, seeds, DataError)) == {"accepted", "refused"}


def features(save: Callable[..., None] = np.savez, **changes: object) -> bytes:
    """An .npz file of two queries and three gallery images."""
    arrays: dict[str, object] = {
        "query_feat": np.eye(2, 4, dtype=np.float32), "gallery_feat": np.eye(3, 4),
        "query_pids": np.arange(2), "gallery_pids": np.arange(3),
        "query_camids": np.zeros(2, np.int64), "gallery_camids": np.ones(3, np.int32),
    }  # fmt: skip
    stream = io.BytesIO()
    save(stream, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return stream.getvalue()


def array_of(header: str, name: str = "query_feat") -> bytes:
    """An .npz file whose first array has this header and no numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        text = f"{header}\n".encode()
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def packed(size: int) -> bytes:
    """An .npz file with `size` extra zeros."""
    stream = io.BytesIO(features())
    with (
        zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("more.npy", "w", force_zip64=True) as record,
    ):
        np.lib.format.write_array_header_1_0(
            record, {"descr": "|i1", "fortran_order": False, "shape": (size,)}
        )
        for _ in range(size // 2**20):
            record.write(bytes(2**20))
    return stream.getvalue()


class Runs:
    """Its pickle runs a shell command."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        import os

        return os.system, ("touch canary",)


WRONG_FEATURES = (
    b"",
    b"PK\x03\x04",
    b"\x93NUMPY",
    features(query_feat=None),
    features(query_feat=np.zeros((2, 4, 1))),
    features(query_feat=np.array([["a", "b"]])),
    features(query_feat=np.full((2, 4), np.nan)),
    features(query_pids=np.array([Runs(), Runs()])),
    features(query_pids=np.array([0.5, 1.5])),
    features(gallery_pids=np.arange(2)),
    array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }"),
    array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }"),
    array_of("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"),
    array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), 'x': 1}"),
    array_of("__import__('os').system('touch canary')"),
    array_of("(" * 5000),
)


def test_made_up_features(fuzz: Callable[..., Counter[str]]) -> None:
    right = (features(), features(np.savez_compressed))
    wrong = (*WRONG_FEATURES, packed(2**28))

    def case(number: int, folder: Path) -> str:
        path = folder / "features.npz"
        path.write_bytes((*right, *wrong)[number])
        found = load_features(path)
        assert (len(found.query), len(found.gallery)) == (2, 3)
        return "accepted"

    outcomes = fuzz(case, range(len(right) + len(wrong)), DataError)
    assert outcomes == {"accepted": len(right), "refused": len(wrong)}


def test_changed_features(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    whole = (features(), features(np.savez_compressed))

    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        path = folder / "features.npz"
        path.write_bytes(mutated(rng.choice(whole), rng, whole))
        found = load_features(path)
        for part in (found.query, found.gallery):
            assert part.test.dtype == torch.float32
            assert bool(torch.isfinite(part.test).all())
        return "accepted"

    assert "refused" in fuzz(case, seeds, DataError)


def rows_of(save: Callable[..., None], **arrays: object) -> bytes:
    """A file of three rows of features; NumPy's `save` takes an array without a name."""
    stream = io.BytesIO()
    rows = np.eye(3, 4, dtype=np.float32)
    if save is np.save:
        np.save(stream, arrays.get("features", rows))
    else:
        save(stream, **{"features": rows, "camids": np.arange(3), **arrays})
    return stream.getvalue()


def take_rows(path: Path) -> None:
    """Reads features as clustering on disk does; room is given for small ones only."""

    def room(shape: tuple[int, int]) -> np.ndarray:
        assert shape[0] * shape[1] < 2**24
        return np.empty(shape, np.float32)

    rows = map_features(path)
    if rows is None:
        copy_features(path, room)
    else:
        assert rows.dtype == np.float32
        assert rows.ndim == 2
    camids = read_camids(path)
    assert camids is None or camids.dtype == np.int64


def test_made_up_rows(fuzz: Callable[..., Counter[str]]) -> None:
    rows = np.eye(3, 4)
    right = (
        rows_of(np.savez), rows_of(np.savez_compressed), rows_of(np.save),
        rows_of(np.save, features=rows.astype(np.float16)), rows_of(np.savez, features=rows),
        safetensors.numpy.save({"features": rows, "camids": np.arange(3)}),
    )  # fmt: skip
    wrong = (
        b"", b"PK\x03\x04", b"\x93NUMPY", rows_of(np.savez, features=rows[0]),
        rows_of(np.savez, features=np.asfortranarray(rows)), rows_of(np.save, features=rows[:0]),
        rows_of(np.savez, camids=np.array(["a"] * 3)), rows_of(np.save, features=rows > 0),
        rows_of(np.savez, features=np.array([Runs(), Runs()])), packed(2**28),
        safetensors.numpy.save({"other": rows}), safetensors.numpy.save({"features": rows[0]}),
        rows_of(np.save)[:-4], rows_of(np.save).replace(b"(3, 4)", b"(9, 4)"),
        rows_of(np.save).replace(b"(3, 4)", b"(-3,4)"),
        *(array_of(header, "features") for header in (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", "(" * 5000,
        )),
    )  # fmt: skip

    def case(number: int, folder: Path) -> str:
        path = folder / "features.npz"
        path.write_bytes((*right, *wrong)[number])
        take_rows(path)
        return "accepted"

    outcomes = fuzz(case, range(len(right) + len(wrong)), DataError)
    assert outcomes == {"accepted": len(right), "refused": len(wrong)}


def test_changed_rows(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    tensors = {"features": np.eye(3, 4, dtype=np.float32), "camids": np.arange(3)}
    whole = (*map(rows_of, (np.savez, np.savez_compressed, np.save)),
             safetensors.numpy.save(tensors))  # fmt: skip

    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        path = folder / "features.npz"
        path.write_bytes(mutated(rng.choice(whole), rng, whole))
        take_rows(path)
        return "accepted"

    assert set(fuzz(case, seeds, DataError)) == {"accepted", "refused"}


def picture(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """A small picture file."""
    pixels = np.random.default_rng(3).integers(0, 255, (20, 12, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


PICTURES = (
    picture("JPEG"), picture("JPEG", "L"), picture("JPEG", progressive=True),
    picture("JPEG", "CMYK"), picture("PNG"), picture("PNG", "RGBA"), picture("PNG", "P"),
    picture("WEBP"), picture("BMP"), picture("GIF"), picture("TIFF"),
    picture("TIFF", compression="tiff_lzw"), picture("PPM"),
)  # fmt: skip


HEADS = (
    b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"GIF89a",
    b"II*\0", b"BM", b"P5 9 9 255 ", b"",
)  # fmt: skip


def test_giant_pictures(fuzz: Callable[..., Counter[str]]) -> None:
    """Sparse files of 2 GiB, which take no space on the disk."""

    def case(number: int, folder: Path) -> str:
        path = folder / "giant.jpg"
        path.write_bytes(HEADS[number])
        with path.open("r+b") as file:
            file.truncate(2**31)
        read_image(str(path))
        return "accepted"

    assert fuzz(case, range(len(HEADS)), DataError) == {"refused": len(HEADS)}


def test_changed_pictures(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        path = folder / "picture.jpg"
        path.write_bytes(mutated(rng.choice(PICTURES), rng, PICTURES))
        pixels = read_image(str(path))
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)
        assert pixels.flags.c_contiguous
        return "accepted"

    # A changed size may be large but still within Pillow's limit, so this needs memory.
    outcomes = fuzz(case, seeds, DataError, growth=3 * 2**29)
    assert set(outcomes) == {"accepted", "refused"}
