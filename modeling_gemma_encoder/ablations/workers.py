"""Where cells run: one after the other in this process, or side by side on Ray."""

import os
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from .cells import Bench, Cell

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class Workers:
    """Run cells and show a progress bar.

    Args:
        bench: What runs a cell.
        count: How many cells run at a time.
        finished_only: Read the cells that are finished, and run none.
    """

    def __init__(self, bench: Bench, count: int = 1, finished_only: bool = False):
        self.bench, self.count, self.finished_only = bench, count, finished_only
        self.pool = None

    def __call__(self, cells: list[Cell]) -> Iterable[dict | None]:
        """Yield the reports of cells in order; None for one that is not finished and not to run."""
        if self.finished_only:
            reports = map(self.bench.read, cells)
        elif self.count == 1:
            reports = map(self.bench.run, cells)
        else:
            self.pool = self.pool or start_pool(self.bench, self.count)
            reports = self.pool.map(lambda actor, cell: actor.run.remote(cell), cells)
        yield from tqdm(reports, total=len(cells), desc="Cells", unit=" cells")


def start_pool(bench: Bench, count: int):
    """Return a pool of Ray actors, each with a GPU, or with an equal share of the cores where there
    are none."""
    import ray  # a dependency of those who run several cells at a time alone
    from ray.util import ActorPool

    environment = {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    ray.init(runtime_env={"env_vars": environment}, log_to_driver=False)
    resources = ray.cluster_resources()
    if resources.get("GPU", 0):
        needs = {"num_gpus": 1, "num_cpus": 0}
    else:
        share = resources["CPU"] / count
        # Ray takes parts of a core, or whole ones.
        needs = {"num_gpus": 0, "num_cpus": share if share < 1 else int(share)}
    actor = ray.remote(**needs)(RemoteBench)
    return ActorPool([actor.remote(os.getcwd(), bench) for _ in range(count)])


class RemoteBench:
    """Run cells in a process of its own, where relative paths mean what they do here."""

    def __init__(self, working_directory: str, bench: Bench):
        os.chdir(working_directory)
        self.bench = bench

    def run(self, cell: Cell) -> dict:
        """Return the report of a cell."""
        return self.bench.run(cell)
