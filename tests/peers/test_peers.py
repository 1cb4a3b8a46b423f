"""Other libraries' own tests of their randomized SVD, with ours in its place."""

import subprocess
import sys

import pytest

# What fails by design, and why.
SKLEARN_EXTMATH = {
    "test_randomized_svd_low_rank_all_dtypes[int32]": "X is zero as integers; asserts which vectors of zero it gets",
    "test_randomized_svd_low_rank_all_dtypes[int64]": "the same",
    "test_randomized_svd_low_rank_with_noise": "asserts that the answer without iterations is wrong; it is exact",
    "test_randomized_svd_infinite_rank": "the same",
    "test_randomized_svd_power_iteration_normalizer": "asserts that many iterations diverge; they do not",
    "test_randomized_svd_sparse_warnings[dok_matrix]": "asserts a warning that this format is slow",
    "test_randomized_svd_sparse_warnings[dok_array]": "the same",
    "test_randomized_svd_sparse_warnings[lil_matrix]": "the same",
    "test_randomized_svd_sparse_warnings[lil_array]": "the same",
}
# Module, which of its tests (the others do not call what is replaced, and take minutes), and what fails.
PEERS = [
    ("sklearn.utils.tests.test_extmath", "randomized_svd", SKLEARN_EXTMATH),
    ("sklearn.decomposition.tests.test_truncated_svd", "", {}),
    ("sklearn.decomposition.tests.test_pca", "randomized or auto", {}),
    ("dask.array.tests.test_linalg", "svd_compressed", {}),
]


@pytest.mark.parametrize(("module", "keyword", "by_design"), PEERS, ids=[x[0] for x in PEERS])
def test_of_a_peer(module, keyword, by_design):
    for name in (module.partition(".")[0], "dask", "sklearn"):
        pytest.importorskip(name)
    options = ["-c", "/dev/null", "-q", "-rf", "--tb=line", "-W", "ignore", "--pyargs", module]
    plugins = ["-p", "tests.peers.replaced", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *options, "-k", keyword],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    failed = {line.split(" - ")[0].rpartition("::")[2] for line in lines}
    assert " passed" in done.stdout, done.stdout + done.stderr
    assert failed == set(by_design), done.stdout
