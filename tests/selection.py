"""What plain ``pytest`` leaves out of ``pytest --thorough``, so that it takes minutes.

A file that is named runs as thoroughly as that; a test that is named (``::``, ``-k``, ``-m``), with all there is of it.
"""

from collections import defaultdict
from collections.abc import Iterable
from zlib import crc32

import pytest

# Files and tests that take long and say little about the machine they run on.
THOROUGH = {
    "test_attention.py::test_gradients_of_scale_and_softcap": "compiles for long",
    "test_attention_vjp.py::test_frameworks_differentiate_the_forward": "compiles for long",
    "test_basis.py::test_repr_of_unlike_ranks_and_of_what_transformations_put_into_a_basis": "compiles for long",
    "test_benchmarks.py": "the benchmarks' own pages",
    "test_blas_threads.py::test_eight_threads_give_the_bits_of_one": "eight times everything",
    "test_cache.py::test_a_file_takes_the_bits_asked_for_and_hardly_more_than_the_entropy": "codes thousands of tokens",
    "test_cache.py::test_appending_copies_each_row_a_few_times_at_most": "ten thousand tokens",
    "test_cache.py::test_under_jit_queries_choose": "compiles for long",
    "test_cache.py::test_under_jit_queries_choose_among_bytes": "compiles for long",
    "test_cache.py::test_under_jit_a_number_is_a_byte": "compiles for long",
    "test_cache.py::test_under_jit_it_is_compiled_once_and_the_same": "compiles for long",
    "test_cache.py::test_under_jit_sequences_differ_in_length_and_an_overflow_shows": "compiles for long",
    "test_complete.py::test_sparse_entries_are_the_observed_ones": "large",
    "test_cupy.py::test_a_mutant_has_wrong_values": "a compiler's run for each mutant of a kernel",
    "test_cupy.py::test_nvrtc_compiles": "NVIDIA's compiler",
    "test_cupy.py::test_nvrtc_compiles_what_other_arguments_make_of_a_kernel": "NVIDIA's compiler",
    "test_cupy.py::test_the_compiler_refuses_mutants_that_are_not_c": "NVIDIA's compiler",
    "test_dask_cluster.py": "starts clusters",
    "test_demo.py::test_demo_backend": "whole programs",
    "test_demo.py::test_demo_needs_no_argument": "a whole program",
    "test_digits_example.py": "trains",
    "test_docs.py::test_the_code_on_a_page_runs": "whole programs",
    "test_docs.py::test_the_code_on_a_page_with_a_model_runs": "a real model",
    "test_examples.py": "whole programs",
    "test_figures.py": "pictures of the documentation",
    "test_files.py::test_damage_is_valueerror_or_does_no_harm": "thousands of damaged files",
    "test_fuzz.py": "hundreds of wrong arguments to each function",
    "test_interop_contract.py::test_an_adapter_imports_only_its_framework": "interpreters",
    "test_interop_contract.py::test_global_state_is_left_alone": "every function on JAX",
    "test_interop_contract.py::test_nan_of_our_own_does_not_stop_a_debugger": "compiles for long",
    "test_jax_module.py::test_examples_run": "compiles for long",
    "test_jax_transforms.py::test_another_number_compiles_nothing": "compiles for long",
    "test_jax_transforms.py::test_decompositions_in_single_precision_warn_of_nothing": "compiles for long",
    "test_jax_transforms.py::test_mapped_over_a_batch": "compiles for long",
    "test_jax_transforms.py::test_strict_modes_change_nothing": "compiles every function once more",
    "test_jax_transforms.py::test_strict_modes_change_nothing_of_attention": "compiles for long",
    "test_low_rank.py::test_jax_differentiates_with_a_constant_basis": "compiles for long",
    "test_low_rank_vjp.py::test_equals_jax": "compiles for long; PyTorch's gradients are compared with",
    "test_objective.py::test_a_prox_in_the_metric_of_the_optimizer_finds_the_minimiser": "thousands of steps",
    "test_objective.py::test_both_forms_descend_monotonically_to_one_optimum": "thousands of steps",
    "test_objective.py::test_one_common_step_stalls_at_the_kinks": "thousands of steps",
    "test_onnx.py": "another's cases, each compiled by JAX",
    "test_other_libraries.py::test_every_setting_of_array_api_strict": "everything in ten settings",
    "test_other_libraries.py::test_what_is_asked_for_is_written_down": "everything once more",
    "test_package.py::test_integrations_are_imported_by_name": "interpreters",
    "test_package.py::test_type_checkers_see_what_comes_out": "a type checker's run",
    "test_peers.py": "other libraries' tests",
    "test_prox_more.py::test_a_number_may_be_learned_and_traced": "compiles for long",
    "test_report.py::test_page_in_a_browser": "a browser",
    "test_report.py::test_several_layers_are_advised_bits_together": "a page, and every table",
    "test_report_model.py": "models",
    "test_solvers.py::test_steps_are_found_where_nothing_can_be_looked_at": "compiles for long",
    "test_svd_never_wrong.py::test_structured_matrices": "many sizes",
    "test_svd_operators.py::test_more_copies_of_a_singular_value_than_a_block_has_columns": "many blocks",
    "test_svd_tolerance.py::test_a_hundred_seeds": "a hundred of each",
    "test_svd_tolerance.py::test_a_tolerance_that_half_precision_cannot_keep": "many sizes",
    "test_torch_module.py::test_a_compiled_call_is_one_graph_but_for_fits": "torch.compile takes seconds",
    "test_torch_module.py::test_a_compiled_layer_fits_as_often_as_it_says_without_new_graphs": "compiles",
    "test_torch_module.py::test_a_schedule_of_l1_is_followed_by_one_graph": "torch.compile takes seconds",
    "test_torch_module.py::test_onnx_takes_any_batch_and_length": "exports",
    "test_torch_module.py::test_traced_and_exported_for_any_batch_and_length": "torch.export takes a second",
    "test_torch_module.py::test_compiles_to_one_graph_with_a_frozen_basis": "torch.compile takes seconds",
    "test_torch_transforms.py": "torch.compile takes seconds for each function",
    "test_transformers.py": "models",
    "test_transformers_cache.py": "models",
}
# Of the sets of parameters of a test, so many on a backend. Elsewhere enough of them that each value of each parameter
# comes up.
SETS = {
    "numpy-readonly": 1,
    "torch-float32": 4,
    "torch-float64": 0,
    "jax": 1,
    "jax-jit": 1,
    "dask": 1,
    "cupy-on-host": 2,
}
# Of tests that only NumPy runs, and hundreds of times.
AT_MOST = {
    "test_svd_never_wrong.py::test_never_wrong": 60,
    "test_svd_never_wrong.py::test_what_lies_along_few_axes": 6,
    "test_svd_tolerance.py::test_spectra": 24,
}
# JAX compiles: eagerly each operation for each shape, under jit each call. One test in so many runs there.
ONE_IN = {"jax": 12, "jax-jit": 2}
# Of tests that jax-jit runs as well, so many run on eager JAX even where all are asked for.
EAGER_ONE_IN = 3


def backend_of(item: pytest.Item) -> str | None:
    """Name of the backend on which a test runs, if it takes the fixture ``xp``."""
    params = getattr(item, "callspec", None)
    return params.params.get("xp") if params else None


def deselected(config: pytest.Config, items: list[pytest.Item]) -> set[pytest.Item]:
    """Items that a command does not run."""
    files = any(".py" in argument for argument in config.args)
    tests = any("::" in argument for argument in config.args)
    if tests or config.option.keyword or config.option.markexpr:
        return set()
    found = _left_out_of_all(items)
    return found if files or config.option.thorough else found | _left_out(items)


def _left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Items that plain ``pytest`` does not run."""
    found, groups = set(), defaultdict(list)
    for item in items:
        name = item.nodeid.partition("[")[0].rpartition("/")[2]
        if name in THOROUGH or item.path.name in THOROUGH:
            found.add(item)
        else:
            groups[name, backend_of(item)].append(item)
    for (name, backend), group in groups.items():
        is_skipped = crc32(name.encode()) % ONE_IN.get(backend, 1)
        kept = [] if is_skipped else _mixed(group)[: SETS.get(backend, AT_MOST.get(name))]
        found.update(set(group).difference(kept))
    return found


def _mixed(group: list[pytest.Item]) -> list[pytest.Item]:
    """Sets of parameters, in an order that has nothing to do with theirs, in which each value of each comes up."""
    seen: set[tuple[str, int]] = set()
    kept = []
    for item in sorted(group, key=lambda item: crc32(item.nodeid.encode())):
        indices = item.callspec.indices if hasattr(item, "callspec") else {}
        values = {pair for pair in indices.items() if pair[0] != "xp"}
        if not kept or not values <= seen:
            kept.append(item)
            seen |= values
    return kept


def _left_out_of_all(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Items that no run has but one that names the tests: on libraries that compile each shape, or make graphs.

    Eager JAX was half the time of all tests. It gets the last set of parameters of each test, and the first too of
    one in `EAGER_ONE_IN` tests; of those that jax-jit runs one in `EAGER_ONE_IN`. jax-jit and Dask get sets in which
    each value of each parameter comes up.
    """
    groups: defaultdict[tuple[str, str | None], list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[item.nodeid.partition("[")[0], backend_of(item)].append(item)
    found: set[pytest.Item] = set()
    for (name, backend), group in groups.items():
        kept = group
        if backend == "jax":
            is_chosen = crc32(name.encode()) % EAGER_ONE_IN == 0
            if group[0].get_closest_marker("eager_only"):
                kept = group[:1] + group[1:][-1:] if is_chosen else group[-1:]
            else:
                kept = group[-1:] if is_chosen else []
        elif backend in ("jax-jit", "dask"):
            kept = _mixed(group)
        found.update(set(group).difference(kept))
    return found
