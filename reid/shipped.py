"""Files that come with the framework: commands, configs, and the weights that the demo starts from.

They are in the checkout, or in a folder of the installed package; both have the same layout.
"""

from __future__ import annotations

from pathlib import Path

from reid.checking import nearest

COMMANDS = {
    "train": "train_net",
    "evaluate": "evaluate",
    "extract": "extract",
    "cluster": "cluster",
    "search": "search",
    "thresholds": "thresholds",
    "export": "export",
    "check-data": "check_data",
    "convert": "convert_weights",
    "export-crops": "export_crops",
    "gpu-check": "gpu_check",
    "report": "report",
    "review": "review",
    "reproduce": "reproduce",
    "visualize": "visualize",
}
"""Words after `reid` on the command line, and the files in `tools` that they run."""

_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent


def shipped_root() -> Path:
    """The folder that holds `tools`, `configs` and `projects`."""
    return _CHECKOUT if (_CHECKOUT / "projects").is_dir() else _PACKAGE / "shipped"


def is_checkout() -> bool:
    """Whether the framework runs from its repository, where `python tools/NAME.py` works."""
    return shipped_root() == _CHECKOUT


def command(tool: str, processes: int = 1) -> list[str]:
    """The words that start a tool from a shell: a file of the checkout, or the installed command.

    Args:
        tool: Its file in `tools`, without the suffix.
        processes: With more than one, torchrun starts the tool.
    """
    python = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else ["python"]
    if is_checkout():
        return [*python, f"tools/{tool}.py"]
    word = next(word for word, name in COMMANDS.items() if name == tool)
    return [*python, "-m", "reid", word] if processes > 1 else ["reid", word]


def tool(name: str) -> str:
    """How a message calls a file of `tools`: `tools/NAME.py`, or the installed command."""
    return command(name)[-1] if is_checkout() else " ".join(command(name))


def find_shipped(path: str | Path) -> Path:
    """The path itself if it exists, or else the shipped file of that name, if there is one.

    `projects/TMGF/weights/demo_backbone.safetensors` thus works in every working directory.
    """
    path = Path(path)
    if path.is_absolute() or _exists(path):
        return path
    shipped = shipped_root() / path
    return shipped if _exists(shipped) else path


def find_config(path: str | Path) -> Path:
    """The config file that a path or a short name means.

    Short names are `PROJECT/FILE` for `projects/PROJECT/configs/FILE`, such as `tmgf/demo.yaml`,
    and `FILE` for `configs/FILE`, such as `own_cameras.yaml`; upper and lower case do not matter. A
    file in the working directory wins over a shipped one.
    """
    found = find_shipped(path)
    if found.is_absolute() or _exists(found):
        return found
    return _short_names().get(_lowered(found), found)


def config_hint(path: str | Path) -> str:
    """A hint that names the shipped config most similar to a path, or an empty text."""
    return nearest(_lowered(Path(path)), _short_names())


def _short_names() -> dict[str, Path]:
    root = shipped_root()
    configs = {
        f"{file.parents[1].name}/{file.name}".lower(): file
        for file in sorted(root.glob("projects/*/configs/*.yaml"))
    }
    return configs | {file.name.lower(): file for file in sorted(root.glob("configs/*.yaml"))}


def _lowered(path: Path) -> str:
    return path.as_posix().lower()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long or has forbidden characters
        return False
