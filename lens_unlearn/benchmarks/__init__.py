"""Public benchmarks with their official scores, one a file, and the table of them, `BENCHMARKS`.

Each is a function under its own name, `lu.benchmarks.lume(model, "DIR", conditions)`, and `lens-unlearn bench NAME`. The numbers
agree with what the published formulas give on the same texts and losses. Knows evaluation, and the random controls of
interventions; knows nothing of how a result is drawn, nor of which method made an intervention.
"""

from lens_unlearn.benchmarks.benchmark import Benchmark
from lens_unlearn.benchmarks.effective_skill import effective_skill
from lens_unlearn.benchmarks.lume import lume
from lens_unlearn.benchmarks.muse import muse
from lens_unlearn.benchmarks.result import BenchmarkResult
from lens_unlearn.benchmarks.running import BenchmarkFunction
from lens_unlearn.benchmarks.rwku import rwku
from lens_unlearn.benchmarks.selective_pruning import selective_pruning
from lens_unlearn.benchmarks.tofu import tofu
from lens_unlearn.benchmarks.wmdp import wmdp
from lens_unlearn.core.errors import LensUnlearnError

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkFunction",
    "BenchmarkResult",
    "by_name",
    "effective_skill",
    "lume",
    "muse",
    "rwku",
    "selective_pruning",
    "tofu",
    "wmdp",
]

BENCHMARKS: tuple[Benchmark, ...] = tuple(
    globals()[name].benchmark for name in __all__ if hasattr(globals().get(name), "benchmark")
)
"""Every benchmark. A new one is a file of its own, imported above, and its name in the list."""


def by_name(name: str) -> Benchmark:
    """Return a benchmark by its name.

    Raises:
        LensUnlearnError: If there is none of that name.
    """
    for one in BENCHMARKS:
        if one.name == name:
            return one
    raise LensUnlearnError(f"there is no benchmark {name!r}: choose from {', '.join(one.name for one in BENCHMARKS)}")
