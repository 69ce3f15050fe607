"""How near the embeddings of an edited encoder are to those of the untouched one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rewire.errors import MeasureError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quality:
    """Embeddings of the same texts by two models.

    Attributes:
        texts: how many.
        worst_cosine: least cosine of the two embeddings of a text.
        median_cosine: median of these.
        rank_correlation: Spearman's, of the similarities of all pairs of texts: whether searches find the same.
        worst_difference: largest difference of two numbers in embeddings of length 1.
    """

    texts: int
    worst_cosine: float
    median_cosine: float
    rank_correlation: float
    worst_difference: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.texts:,} texts: cosine {self.worst_cosine:.6f} at worst, {self.median_cosine:.6f} in the median; "
            f"rank correlation of similarities {self.rank_correlation:.6f}"
        )


def quality(before: NDArray[np.float32], after: NDArray[np.float32]) -> Quality:
    """Compares embeddings `[texts, width]` of the same texts, row by row.

    Raises `MeasureError` for fewer than three texts, other shapes, or numbers that are not finite.

    >>> import numpy as np
    >>> rows = np.array([[1, 0], [0.6, 0.8], [-1, 0.1]], dtype=np.float32)
    >>> quality(rows, 2 * rows).worst_cosine
    1.0
    """
    import numpy as np

    if before.shape != after.shape or before.ndim != 2:
        raise MeasureError(f"embeddings of shapes {before.shape} and {after.shape} cannot be compared")
    if len(before) < 3:
        raise MeasureError(f"{len(before)} texts are too few to compare; give at least 3")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise MeasureError("some embeddings are not finite; the model is broken, or its type too narrow")
    first, second = (_unit(rows) for rows in (before, after))
    cosines = np.clip((first * second).sum(1), -1.0, 1.0)
    pairs = np.triu_indices(len(first), 1)
    ranks = [_ranks((rows @ rows.T)[pairs]) for rows in (first, second)]
    return Quality(
        len(first),
        round(float(cosines.min()), 9),
        round(float(np.median(cosines)), 9),
        round(float(np.corrcoef(*ranks)[0, 1]), 9),
        float(np.abs(first - second).max()),
    )


def _unit(rows: NDArray[np.float32]) -> Any:
    import numpy as np

    wide = rows.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)


def _ranks(values: Any) -> Any:
    """Ranks, equal values with the mean of theirs."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
