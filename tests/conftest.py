"""Shared by all tests: hypothesis profiles, models on disk, and a guard against tests that leave traces."""

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import sklearn.cluster  # noqa: F401 - its import draws random numbers, which no test may
import tiny
import torch
from hypothesis import HealthCheck, settings

_HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=_HEALTH
)
settings.register_profile("nightly", max_examples=2000, deadline=None, database=None, suppress_health_check=_HEALTH)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, each on a core of its own
    torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    # `datasets` leaves the files of an unfinished stream to the garbage collector.
    config.addinivalue_line("filterwarnings", "ignore:unclosed file:ResourceWarning")
    config.addinivalue_line("markers", "changes_random_state: the test may move the global random state")


@pytest.fixture(autouse=True)
def _no_trace(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves hooks, changes parameters, grad mode, default dtype or the global random state."""
    tiny.used.clear()
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), random.getstate())
    state = torch.get_rng_state()
    yield
    problems = [f"{name}: {found}" for name in sorted(tiny.used) if (found := tiny.left_behind(name))]
    if (torch.is_grad_enabled(), torch.get_default_dtype()) != before[:2]:
        problems.append("grad mode or default dtype")
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
    moved = not torch.equal(torch.get_rng_state(), state)
    if not request.config.getoption("jaxtyping_packages", None):  # whose type checker draws the items that it looks at
        moved = moved or random.getstate() != before[2]
    if moved and request.node.get_closest_marker("changes_random_state") is None:
        problems.append("the global random state")
    if problems:
        pytest.fail(f"the test left a trace: {'; '.join(problems)}")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with its tokenizer, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tiny.save_model(str(folder))
    return folder


@pytest.fixture(scope="session")
def loaded(model_dir: Path) -> Any:
    """The model of `model_dir`, as `load_model` gives it: with a tokenizer."""
    import lens_unlearn as lu

    with tiny.quiet():
        model = lu.load_model(model_dir, device="cpu")
        tiny.share("loaded", model)
    return model


@pytest.fixture
def model(loaded: Any) -> Any:
    """A model with a tokenizer, guarded."""
    tiny.used.add("loaded")
    return loaded


@pytest.fixture(params=tiny.ALL)
def each(request: pytest.FixtureRequest) -> str:
    """The name of every model that neurons can be looked at in."""
    return request.param


@pytest.fixture(params=tiny.DENSE)
def dense(request: pytest.FixtureRequest) -> str:
    """The name of every architecture of which there is a plain model to compare with."""
    return request.param


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Turn every warning into an error, in this test's own words."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
