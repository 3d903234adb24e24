"""Person re-identification: images become embeddings, pseudo-labels, a loss.

The front door of a trained model; docs/use.md shows it:

    predictor = reid.Predictor("logs/run")
    features = predictor(["a.jpg", "b.jpg"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reid.evaluation.report import evaluate_features
    from reid.workflows.predict import Predictor, load_model

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__", "evaluate_features", "load_model"]

_MODULES = {
    "Predictor": "reid.workflows.predict",
    "load_model": "reid.workflows.predict",
    "evaluate_features": "reid.evaluation.report",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, since torch alone takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
