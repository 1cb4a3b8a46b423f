"""Find related texts by their singular vectors: latent semantic analysis of the documentation inside Python.

``pydoc_data.topics``, the text behind ``help("slicings")``, ships with every Python. Each topic becomes a row that
counts its words, those that many topics share counting less (TF-IDF). The matrix is sparse, and stays so: of it
`slra.randomized_svd` takes products only. In the space of the first singular vectors topics are close that use words
which occur together, even where they share few words themselves.

Run: python examples/tfidf_svd.py
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

import slra

RANK, RANKS = 10, (2, 5, 10, 20, 40)
ASKED = ("slicings", "while", "exceptions", "floating", "context-managers")


def word_matrix() -> tuple[list[str], csr_matrix]:
    """Return the names of the topics, and their TF-IDF matrix: a row each, as scipy.sparse."""
    names = sorted(topics)
    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"[a-z_]{3,}", min_df=2)
    return names, vectorizer.fit_transform([topics[name] for name in names])


def neighbours(vectors: np.ndarray, names: list[str], name: str, n: int = 3) -> list[str]:
    """Return the topics whose vectors make the smallest angles with that of one."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[names.index(name)]
    order = np.argsort(-cosine)
    return [names[i] for i in order if names[i] != name][:n]


class Comparison(NamedTuple):
    """By rank: the relative error, and how far it is above the least possible, of slra and of scikit-learn."""

    error: dict[int, float]
    excess: dict[int, float]
    excess_sklearn: dict[int, float]


def compare(x: csr_matrix) -> Comparison:
    """How good is it? So small a matrix has all its singular values computed, which say what the best rank r leaves."""
    dense = x.toarray()
    sigma = np.linalg.svd(dense, compute_uv=False)
    done = Comparison({}, {}, {})
    for rank in RANKS:
        U, S, Vh = slra.randomized_svd(x, rank, rng=0)
        model = TruncatedSVD(rank, random_state=0)
        scores = model.fit_transform(x)
        least = np.linalg.norm(sigma[rank:])
        left = np.linalg.norm(dense - (U * S) @ Vh)
        done.error[rank] = float(left / np.linalg.norm(sigma))
        done.excess[rank] = float(left / least - 1)
        left = np.linalg.norm(dense - scores @ model.components_)
        done.excess_sklearn[rank] = float(left / least - 1)
    return done


class Numbers(NamedTuple):
    """What was measured."""

    shape: tuple[int, int]
    density: float
    by_rank: Comparison
    centred_error: float
    neighbours: dict[str, list[str]]


def main(picture: str | Path = "tfidf_svd.png") -> Numbers:
    names, x = word_matrix()
    density = x.nnz / (x.shape[0] * x.shape[1])
    print(f"{x.shape[0]} topics, {x.shape[1]} words, {density:.1%} of the entries are not zero")

    # From rank 20 on the iteration spans all rows of so small a matrix: the answer is exact.
    done = compare(x)
    print("rank: relative error; above the least possible: slra, scikit-learn (5 iterations)")
    for rank, error in done.error.items():
        above = max(done.excess[rank], 0)
        print(f"  {rank}: {error:.3f}; {above:.1e}, {done.excess_sklearn[rank]:.1e}")

    # Where the topics are: the rows of U S. Their angles are what counts.
    U, S, Vh = slra.randomized_svd(x, RANK, rng=0)
    near = {name: neighbours(U * S, names, name) for name in ASKED}
    print(f"nearest topics at rank {RANK}:")
    for name, found in near.items():
        print(f"  {name} ~ {', '.join(found)}")

    # Principal components want the mean of each column taken off. That would fill the matrix; products are corrected
    # instead.
    U, S, Vh = slra.randomized_svd(x, RANK, center=True, rng=0)
    centred = x.toarray() - x.toarray().mean(axis=0)
    centred_error = float(np.linalg.norm(centred - (U * S) @ Vh) / np.linalg.norm(centred))
    print(f"centred without filling the matrix, rank {RANK}: relative error {centred_error:.3f}")
    draw(names, U * S, done, Path(picture))
    return Numbers(x.shape, density, done, centred_error, near)


def draw(names: list[str], components: np.ndarray, done: Comparison, path: Path) -> None:
    """The topics in the plane of two principal components, and how far from the least error each way is."""
    figure = Figure(figsize=(5, 6.6), layout="constrained")
    plane, errors = figure.subplots(2, 1, height_ratios=(5, 3))
    plane.scatter(*components[:, :2].T, s=16, color="#0072B2")
    for name in (
        "while",
        "for",
        "try",
        "numbers",
        "floating",
        "conversions",
        "class",
        "types",
        "naming",
        "customization",
        "specialnames",
    ):
        if name in names:
            at = components[names.index(name), :2]
            plane.annotate(name, at, (4, 3), textcoords="offset points", fontsize=9)
    plane.set(
        title="Topics, a dot each, some by name",
        xlabel="first principal component",
        ylabel="second principal component",
    )
    styles = (("slra", "#0072B2", "s"), ("scikit-learn, 5 iterations", "#D55E00", "o"))
    for one, (label, color, marker) in zip(done[1:], styles, strict=True):
        above = [100 * value for value in one.values()]
        errors.plot(list(one), above, marker + "-", color=color, label=label)
    errors.set(xlabel="rank", ylabel="error, % above\nthe least possible", xticks=RANKS)
    errors.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main(*sys.argv[1:])
