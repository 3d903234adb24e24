"""The command `reid`: `reid train` runs `tools/train_net.py`, and so on."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from reid import __version__
from reid.checking import nearest
from reid.shipped import COMMANDS, shipped_root

_COMMAND = re.compile(r"python tools/(\w+)\.py")


def main() -> int:
    """Runs a command; returns its exit code, 2 if there is no such command."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if word == "--version":
        sys.stdout.write(f"reid {__version__}\n")
        return 0
    if word not in COMMANDS:
        hint = nearest(word, COMMANDS)
        sys.stderr.write(f"reid: there is no command {word!r}{hint}\n\n{_help()}")
        return 2
    sys.argv[:2] = [f"reid {word}"]
    return _tool(COMMANDS[word])()


def _tool(name: str) -> Callable[[], int]:
    """The `main` of a file in `tools`."""
    spec = importlib.util.spec_from_file_location(f"reid.tools.{name}", _file(name))
    if spec is None or spec.loader is None:
        raise ImportError(f"{_file(name)} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "EPILOG" in vars(module):
        vars(module)["EPILOG"] = _COMMAND.sub(_as_word, vars(module)["EPILOG"])
    return cast("Callable[[], int]", module.main)


def _as_word(match: re.Match[str]) -> str:
    """`reid search` for `python tools/search.py`, which an installed package does not have."""
    return next((f"reid {word}" for word, name in COMMANDS.items() if name == match[1]), match[0])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {word:<{width}}  {_first_line(name)}" for word, name in COMMANDS.items()]
    return "\n".join(
        [
            "usage: reid COMMAND ...",
            "",
            *lines,
            "",
            "reid COMMAND --help explains a command. With several processes: "
            "torchrun --nproc-per-node N -m reid train ...",
            "",
        ]
    )


def _first_line(name: str) -> str:
    """The first line of a tool's docstring, read without importing the tool."""
    text = ast.get_docstring(ast.parse(_file(name).read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def _file(name: str) -> Path:
    return shipped_root() / "tools" / f"{name}.py"


if __name__ == "__main__":
    sys.exit(main())
