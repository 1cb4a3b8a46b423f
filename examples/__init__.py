"""Scripts to read from top to bottom. ``python -m benchmarks.examples`` runs them for the documentation."""

import re
from pathlib import Path

__all__ = ["EXAMPLES", "OUTPUT", "PAGES", "PICTURES"]

EXAMPLES = (
    "compress_model_attention",
    "mri_low_rank_sparse",
    "robust_pca_video",
    "tfidf_svd",
    "total_variation",
    "train_compiled",
    "train_with_l1",
)
_DOCS = Path(__file__).parents[1] / "docs"
PAGES = _DOCS / "examples"
PICTURES = _DOCS / "_static" / "examples"
# Where a page shows what a script printed: its only block of text.
OUTPUT = re.compile(r"^```text\n(.*?)```\n", flags=re.MULTILINE | re.DOTALL)
