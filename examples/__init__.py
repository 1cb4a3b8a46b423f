"""Scripts to read from top to bottom. ``python -m examples`` runs them for the documentation."""

from pathlib import Path

__all__ = ["EXAMPLES", "OUTPUT", "PICTURES"]

EXAMPLES = ("compress_model_attention", "robust_pca_video", "tfidf_svd", "train_with_l1")
_DOCS = Path(__file__).parents[1] / "docs"
OUTPUT = _DOCS / "examples"
PICTURES = _DOCS / "_static" / "examples"
