"""Plots of features: similarities of right and wrong pairs, and maps in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from reid.evaluation.evaluation import PairSimilarities
from reid.files import replacing
from reid.pictures.canvas import GREY, PALETTE, Colour

Method = Literal["tsne", "umap"]
_FINE_BINS = 10_000  # for thresholds; drawn bins are coarser
_MARKERS = "osD^vP*X"


class Threshold(NamedTuple):
    """A similarity from which on pairs count as the same person.

    Attributes:
        similarity: The cosine.
        false_rate: At most this share of the pairs of different persons lies at or above it.
        found: Share of the pairs of the same person that lies at or above it.
    """

    similarity: float
    false_rate: float
    found: float


def similarity_thresholds(
    positive: NDArray[np.int64],
    negative: NDArray[np.int64],
    edges: NDArray[np.float64],
    false_rates: Sequence[float] = (1e-2, 1e-3, 1e-4),
) -> list[Threshold]:
    """The lowest thresholds with at most the given shares of wrong pairs at or above them.

    Args:
        positive: (bins,) pairs of the same person; at least one.
        negative: (bins,) pairs of different persons.
        edges: (bins + 1,) edges of the bins, ascending.
        false_rates: Shares of the negative pairs. A share of less than one pair is left out, since
            there are too few pairs to measure it.
    """
    total = int(negative.sum())
    # number of pairs from each edge on
    false = np.append(np.cumsum(negative[::-1])[::-1], 0)
    true = np.append(np.cumsum(positive[::-1])[::-1], 0)
    found = []
    for rate in false_rates:
        if rate * total >= 1:
            place = int(np.argmax(false <= rate * total))
            found.append(Threshold(float(edges[place]), rate, float(true[place] / true[0])))
    return found


def draw_similarities(path: Path, similarities: PairSimilarities, bins: int = 100) -> None:
    """Draws how similar images of the same and of different persons are, with thresholds.

    Both histograms show shares of their pairs. Junk is ignored; see `PairSimilarities.histogram`.

    Args:
        path: The PNG to write.
        similarities: The pairs to draw.
        bins: The largest number of bins over the range of similarities.

    Raises:
        ValueError: There are no pairs of one of the kinds, or no bin.
    """
    if bins < 1:
        raise ValueError(f"bins: expected 1 or more, got {bins}")
    similarities.require_pairs()
    positive, negative, edges = similarities.histogram(_FINE_BINS)
    thresholds = similarity_thresholds(positive, negative, edges)
    filled = np.flatnonzero(positive + negative)
    wide = -(-(filled[-1] + 1 - filled[0]) // bins)  # fine bins per drawn bin
    starts = np.arange(filled[0], filled[-1] + 1, wide)
    positive, negative = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    edges = edges[[*starts, min(starts[-1] + wide, _FINE_BINS)]]
    shares = positive / positive.sum(), negative / negative.sum()
    overlap = float(np.minimum(*shares).sum())
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for share, count, text, colour, style in (
        (shares[1], negative, "different persons", PALETTE[5], "--"),
        (shares[0], positive, "same person, other camera", PALETTE[0], "-"),
    ):
        label = f"{text} ({count.sum():,} pairs)"
        axes.stairs(100 * share, edges, fill=True, alpha=0.3, color=_rgb(colour))
        axes.stairs(100 * share, edges, color=_rgb(colour), linestyle=style, label=label, lw=1.6)
    for threshold, style in zip(thresholds, ("-", "--", ":"), strict=False):
        label = (
            f"from {threshold.similarity:.4f}: 1 of {1 / threshold.false_rate:,.0f} wrong pairs, "
            f"{100 * threshold.found:.1f}% of the right ones"
        )
        axes.axvline(threshold.similarity, color="black", linestyle=style, lw=1.1, label=label)
    margin = 0.02 * (edges[-1] - edges[0])
    axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("share of the pairs, %")
    axes.set_title(f"Similarities; the two overlap by {100 * overlap:.1f}%")
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    _save(figure, path)


def embed(features: Tensor, method: Method = "tsne", *, seed: int = 0) -> NDArray[np.float64]:
    """Maps features to the plane, similar features near each other.

    t-SNE is scikit-learn's (van der Maaten and Hinton, JMLR 2008); UMAP is umap-learn's (McInnes et
    al., 2018), an optional package.

    Args:
        features: (N, D) of unit length; N of 3 or more.
        method: `tsne` or `umap`.
        seed: Seed of the random start.

    Returns:
        (N, 2).

    Raises:
        ValueError: There are fewer than three images.
        ModuleNotFoundError: umap-learn is not installed.
    """
    if len(features) < 3:
        raise ValueError(f"features: expected 3 images or more, got {len(features)}")
    values = features.detach().float().cpu().numpy()
    if method == "umap":
        try:
            from umap import UMAP
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "umap needs the package umap-learn, which is not installed: "
                "pip install 'reid[umap]', or take t-SNE",
                name=error.name,
            ) from error
        neighbours = min(15, len(values) - 1)
        reducer: Any = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed)
    else:
        from sklearn.manifold import TSNE

        reducer = TSNE(perplexity=min(30, (len(values) - 1) / 3), init="pca", random_state=seed)
    return np.asarray(reducer.fit_transform(values), dtype=np.float64)


def draw_embedding(
    path: Path,
    points: NDArray[np.float64],
    groups: Tensor,
    title: str,
    *,
    noun: str = "identity",
    largest: int = 24,
) -> None:
    """Draws points in the plane, coloured and shaped by group.

    Args:
        path: The PNG to write.
        points: (N, 2).
        groups: (N,) group of each point, a whole number; -1 = none.
        title: Title above the plot.
        noun: What a group is, for the legend.
        largest: How many of the largest groups get a colour; all others are small and grey.

    Raises:
        ValueError: Lengths do not fit.
    """
    labels = groups.cpu().numpy()
    if points.shape != (len(labels), 2):
        raise ValueError(f"points: expected ({len(labels)}, 2), got {points.shape}")
    names, sizes = np.unique(labels[labels >= 0], return_counts=True)
    order = np.sort(names[np.argsort(-sizes, kind="stable")[:largest]])
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    rest = ~np.isin(labels, order)
    if rest.any():
        axes.scatter(
            points[rest, 0], points[rest, 1], s=8, color=_rgb(GREY), alpha=0.5, lw=0, label="others"
        )
    for number, name in enumerate(order):
        axes.scatter(
            points[labels == name, 0],
            points[labels == name, 1],
            s=34,
            color=_rgb(PALETTE[number % len(PALETTE)]),
            marker=_MARKERS[number // len(PALETTE) % len(_MARKERS)],
            edgecolors="white",
            linewidths=0.4,
            label=f"{noun} {name}",
        )
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    _tidy(axes)
    _save(figure, path)


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _rgb(colour: Colour) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255
