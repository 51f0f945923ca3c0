"""Helpers shared by tests: an independent SplitMix64."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15


def splitmix_array(key: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (key.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
