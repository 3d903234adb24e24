"""What a file is, by its first bytes, whatever its name.

Pictures, weights and lists are downloaded, copied and renamed; a file that then cannot be read is
most often one of these kinds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reid.files import InputError, open_regular

HEAD = 1024
"""How many of its first bytes tell the kind of a file."""

Group = Literal["picture", "video", "pointer", "message", "archive", "model", "data"]


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of files.

    Attributes:
        name: Short: `HEIC`.
        group: What it is for; a `pointer` stands for a file that lies elsewhere, a `message` is
            what a server sends in place of a file.
        phrase: For messages: `a HEIC picture`.
        advice: What to do where something else was expected.
    """

    name: str
    group: Group
    phrase: str
    advice: str = ""


def find_kind(head: bytes) -> FileKind | None:
    """The kind of a file that starts with these bytes (`HEAD` of them, or the whole file).

    None if no kind fits. Pickles, safetensors and tables of numbers are not among the kinds.
    """
    if not head:
        return _EMPTY
    for pattern, kind in _BY_CONTENT:
        if pattern.match(head):
            return kind
    return None


def kind_of_file(path: str | Path) -> FileKind | None:
    """The kind of a regular file by its content.

    Raises:
        InputError: The file cannot be read, or is not a regular file.
    """
    return find_kind(read_head(path))


def read_head(path: str | Path) -> bytes:
    """The first bytes of a regular file.

    Raises:
        InputError: The file cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        try:
            return file.read(HEAD)
        except OSError as error:  # a broken disk; a file of the system that is none on one
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _picture(name: str) -> FileKind:
    return FileKind(name, "picture", f"{_article(name)} {name} picture")


def _model(name: str) -> FileKind:
    return FileKind(name, "model", f"{_article(name)} {name} model", _OTHER_LIBRARY)


def _archive(name: str) -> FileKind:
    return FileKind(name, "archive", f"a {name} archive", "unpack it, and name the file in it")


def _article(name: str) -> str:
    return "an" if name.startswith(("A", "E", "I", "O", "SVG", "XCF")) else "a"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OTHER_LIBRARY = (
    "it is made for inference and has lost its tensors' names; use the checkpoint that it was "
    "made from (.pth, .pt, .safetensors)"
)
_EMPTY = FileKind("empty", "pointer", "empty (0 bytes)", "a copy or download failed; get it again")
_LFS = FileKind(
    "Git LFS pointer",
    "pointer",
    "a Git LFS pointer, not the file that it stands for",
    "run `git lfs pull` in its repository, or download the file itself from the project's page",
)
_ANNEX = FileKind(
    "git-annex pointer",
    "pointer",
    "a git-annex pointer, not the file that it stands for",
    "run `git annex get` on it",
)
_DVC = FileKind(
    "DVC pointer",
    "pointer",
    "a DVC pointer, not the file that it stands for",
    "run `dvc pull` on it",
)
_PAGE = FileKind(
    "web page",
    "message",
    "a web page, not the file that its address promised",
    "open the address in a browser: it shows a log-in, a question or an error; download the file "
    "itself from there",
)
_SERVER_ERROR = FileKind(
    "error message",
    "message",
    "the error message of a server, not the file that its address promised",
    "read it, then download the file again",
)
_HEIC = _picture("HEIC")
_SAVED_MODEL = _model("TensorFlow")

_XML = rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*"
# The first pattern that fits counts. Signatures of two or three bytes include the bytes that must
# follow, since text may start with the same letters.
_BY_CONTENT: tuple[tuple[re.Pattern[bytes], FileKind], ...] = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"\xff\xd8\xff", _picture("JPEG")),
        (rb"\x89PNG\r\n\x1a\n", _picture("PNG")),
        (rb"GIF8[79]a", _picture("GIF")),
        (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", _picture("BMP")),
        (rb"RIFF....WEBP", _picture("WebP")),
        (rb"II\*\0.{4}|MM\0\*.{4}|II\+\0\x08\0\0\0|MM\0\+\0\x08\0\0", _picture("TIFF")),
        (rb"P[1-6](?:\s|#[^\n]*\n)+[0-9]", _picture("PPM")),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51\0", _picture("JPEG 2000")),
        (rb"....ftypavi[fs]", _picture("AVIF")),
        (rb"....ftyp(?:heic|heix|heim|heis|hevc|hevx)", _HEIC),
        (rb"....ftyp(?:mif1|msf1).{4}(?:....)*?avi[fs]", _picture("AVIF")),
        (rb"....ftyp(?:mif1|msf1)", _HEIC),
        (rb"....ftypcrx ", _picture("camera raw")),
        (rb"FUJIFILMCCD-RAW|IIRO|IIRS|MMOR", _picture("camera raw")),
        (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", _picture("JPEG XL")),
        (rb"8BPS\0[\x01\x02]", _picture("PSD")),
        (rb"%!PS|\xc5\xd0\xd3\xc6", _picture("PostScript")),
        (rb"\x76\x2f\x31\x01", _picture("OpenEXR")),
        (rb"DDS \x7c\0\0\0", _picture("DDS")),
        (rb"qoif.{8}[\x03\x04]", _picture("QOI")),
        (rb"gimp xcf", _picture("XCF")),
        (rb"P7\nWIDTH|P[Ff]\n[0-9]", _picture("PAM or PFM")),
        (rb"....ftyp", FileKind("MP4", "video", "a video")),
        (rb"....(?:moov|mdat|wide)....", FileKind("QuickTime", "video", "a video")),
        (rb"RIFF....AVI ", FileKind("AVI", "video", "a video")),
        (rb"\x1a\x45\xdf\xa3", FileKind("Matroska", "video", "a video")),
        (rb"\0\0\x01[\xba\xb3]|FLV\x01", FileKind("MPEG", "video", "a video")),
        (rb"version https://git-lfs\.github\.com/spec/", _LFS),
        (rb"(?:(?:\.\./)*\.git)?/annex/objects/", _ANNEX),
        (rb"(?:(?:md5|frozen|wdir): \S+\s+)*outs:\s+- (?:md5|etag|hash|size|path)", _DVC),
        (_XML + rb"(?:<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]", _picture("SVG")),
        (_XML + rb"<net\s", _model("OpenVINO")),
        (_XML + rb"(?i:<(?:!doctype\s+html|html|head|body|script|meta)[\s>])", _PAGE),
        (_XML + rb"(?i:<(?:error|message|code)[\s>])", _SERVER_ERROR),
        (rb"\s*\{\s*\"(?:error|message|errors|detail|code)\"\s*:", _SERVER_ERROR),
        (rb"\s*\{(?=.*\"weight_map\"\s*:)", FileKind(
            "index of parts", "model", "the index of a checkpoint in several parts",
            "convert each of the parts that it names, or join them where they come from",
        )),
        (rb"\x08\x01\x12.{1,5}\x0a", _SAVED_MODEL),
        # a protocol buffer: field 1 is the version, then come the writer's name or the graph
        (rb"\x08[\x02-\x14](?:\x12[\0-\x40][ -~]|\x12\0|\x3a|\x42[\x02-\x40])", _model("ONNX")),
        (rb"\x08[\x01-\x14]\x12.{1,5}\x0a", _model("Core ML")),
        (rb"....TFL3", _model("TensorFlow Lite")),
        (rb"\x89HDF\r\n\x1a\n", FileKind(
            "HDF5", "model", "an HDF5 file, as Keras and MATLAB write them", _OTHER_LIBRARY,
        )),
        (rb"model_checkpoint_path:", _SAVED_MODEL),
        (rb"(?:ptrt|ftrt)", _model("TensorRT")),
        (rb"GGUF", _model("GGUF")),
        (rb"7767517\n", _model("ncnn")),
        (rb"\x93NUMPY", FileKind("NumPy", "data", "an array of NumPy (.npy)")),
        (rb"MATLAB \d\.\d MAT-file", FileKind("MATLAB", "data", "a MATLAB file")),
        (rb"%PDF-", FileKind("PDF", "data", "a PDF document")),
        (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", _archive("zip")),
        (rb"\x1f\x8b", _archive("gzip")),
        (rb"BZh[1-9]", _archive("bzip2")),
        (rb"\xfd7zXZ\0", _archive("xz")),
        (rb"\x28\xb5\x2f\xfd", _archive("Zstandard")),
        (rb"7z\xbc\xaf\x27\x1c", _archive("7z")),
        (rb"Rar!\x1a\x07", _archive("RAR")),
        (rb".{257}ustar", _archive("tar")),
    )
)  # fmt: skip

PICTURE_SUFFIXES: Mapping[str, str] = {
    suffix: kind
    for kind, suffixes in {
        "JPEG": ".jpg .jpeg .jpe .jfif .jif .pjpeg .pjp",
        "PNG": ".png .apng",
        "GIF": ".gif",
        "BMP": ".bmp",
        "WebP": ".webp",
        "TIFF": ".tif .tiff",
        "PPM": ".ppm .pgm .pbm .pnm",
        "JPEG 2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
        "AVIF": ".avif .avifs",
        "HEIC": ".heic .heif .hif .heics .heifs",
        "JPEG XL": ".jxl",
        "PSD": ".psd .psb",
        "PostScript": ".eps .ps .ai",
        "SVG": ".svg .svgz",
        "OpenEXR": ".exr",
        "Radiance": ".hdr",
        "DDS": ".dds",
        "QOI": ".qoi",
        "XCF": ".xcf",
        "ICO": ".ico",
        "Targa": ".tga",
        "PCX": ".pcx",
        "PAM or PFM": ".pam .pfm",
        # most are TIFF files with a small preview beside the sensor's data
        "camera raw": ".dng .nef .nrw .cr2 .cr3 .crw .arw .srf .sr2 .orf .rw2 .raf .pef .srw",
    }.items()
    for suffix in suffixes.split()
}
"""Suffixes of pictures, in small letters, and the kind that they promise."""

VIDEO_SUFFIXES = _words("""
    .mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .mts .m2ts .3gp .dav .h264 .264 .h265 .265
    .hevc
""")
"""Suffixes of videos."""

OTHER_SUFFIXES = _words("""
    .txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .log .pdf .tex
    .doc .docx .xls .xlsx .ods .ppt .pptx .py .pyc .ipynb .m .mat .npy .npz .h5 .hdf5 .pkl .pickle
    .pt .pth .safetensors .onnx .db .sqlite .lmdb .mdb .lock .zip .tar .gz .tgz .bz2 .xz .7z .rar
    .zst .sh .bat .exe .dll .so .lnk .url .wav .mp3 .srt .vtt .part .tmp .crdownload .dvc .c .cpp .h
    .js .css
""")
"""Suffixes of files that are not pictures; these files are never opened."""
