"""Runs in worker processes, each to a file of its own, so that a study that was stopped goes on where it was."""

import json
import multiprocessing
import os
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.training.plan import Group
from benchmarks.training.settings import Method
from benchmarks.training.train import train, warm_up


def run_file(runs: Path, group: Group, method: Method) -> Path:
    name = "".join(c if c.isalnum() or c == "." else "-" for c in method.name)
    return runs / f"{group.setting.task}_{name}_{group.seed}.json"


def finished(path: Path, group: Group, method: Method) -> dict[str, Any] | None:
    """A run that was made with just these settings."""
    try:
        run = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    same = run["setting"] == group.setting._asdict() and run["options"] == method._asdict()
    return run if same else None


def one_thread() -> None:
    torch.set_num_threads(1)


def run_group(group: Group, runs: Path) -> None:
    """Train what is missing of a group, each run to its own file."""
    paths = {method: run_file(runs, group, method) for method in group.methods}
    missing = [method for method in paths if finished(paths[method], group, method) is None]
    warm = None
    if any(method.warm for method in missing):
        warm = warm_up(group.setting, group.seed)
    for method in missing:
        result = {"part": group.part, **train(group.setting, method, group.seed, warm)}
        partial = paths[method].with_suffix(".part")
        partial.write_text(json.dumps(result))
        partial.replace(paths[method])


def collect(groups: list[Group], runs: Path) -> list[dict[str, Any]]:
    found = [
        finished(run_file(runs, group, method), group, method)
        for group in groups
        for method in group.methods
    ]
    return [run for run in found if run is not None]


def run_all(groups: list[Group], runs: Path, workers: int) -> None:
    """Work through the groups in processes of one thread each, with a bar that counts runs."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers, before their BLAS is loaded
    runs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    total = sum(len(group.methods) for group in groups)
    with (
        Progress() as bar,
        ProcessPoolExecutor(workers, mp_context=spawn, initializer=one_thread) as pool,
    ):
        task = bar.add_task("runs", total=total)
        pending: set[Future[None]] = {pool.submit(run_group, group, runs) for group in groups}
        while pending:
            done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
            bar.update(task, completed=len(collect(groups, runs)))
            try:
                for future in done:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
