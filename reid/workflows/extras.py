"""Optional packages, which only some tools need."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from reid.registry import ConfigError

Extra = Literal["export", "serve"]


def require_packages(what: str, extra: Extra, names: Sequence[str]) -> None:
    """Requires that optional packages can be imported.

    Args:
        what: What needs them, for the message.
        extra: Which of this framework's extras installs them.
        names: Their modules.

    Raises:
        ConfigError: One is not installed, or its import fails.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs packages that are not installed ({', '.join(missing)}): "
            f"pip install 'reid[{extra}]'"
        )
    for name in names:
        try:
            import_module(name)
        # Compiled parts fail in many ways: a missing library, an unknown symbol, another NumPy.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{what} needs {name}, which is installed but cannot be imported "
                f"({type(error).__name__}: {reason}); install it anew: pip install "
                f"--force-reinstall 'reid[{extra}]'"
            ) from error
