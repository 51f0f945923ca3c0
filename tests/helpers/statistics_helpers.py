"""Shared words of the tests: statistics."""

from typing import Any

import numpy as np

from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.moments import Moments

A, B, Z = Site(0, "mlp.post"), Site(3, "mlp.post"), Site(1, "attn.z")


READINGS = ("mean", "std", "rms", "mean_abs", "positive", "mean_sqrt", "min", "max")


def oracle(x: Any) -> dict[str, np.ndarray]:
    """Two passes in float64, over ``[tokens, neurons]`` counted values."""
    x = np.asarray(x, dtype=np.float64)
    mean = x.mean(0)
    return {
        "mean": mean,
        "std": np.sqrt(((x - mean) ** 2).mean(0)),
        "rms": np.sqrt((x**2).mean(0)),
        "mean_abs": np.abs(x).mean(0),
        "positive": (x > 0).mean(0),
        "mean_sqrt": np.sqrt(np.abs(x)).mean(0),
        "min": x.min(0),
        "max": x.max(0),
    }


def assert_close(moments: Moments, expected: dict[str, np.ndarray], *, rtol: float = 1e-6, site: Site = A) -> None:
    """Relative to the value, or to the standard deviation where a value is small beside it."""
    for name in READINGS:
        got = getattr(moments, name)[site].reshape(-1).numpy()
        scale = np.maximum(np.abs(expected[name]), expected["std"]) if name == "mean" else np.abs(expected[name])
        np.testing.assert_array_less(np.abs(got - expected[name]), rtol * scale + 1e-12, err_msg=name)
