"""Intervals over the seeds of an experiment."""

import numpy as np
import scipy.stats


def interval(values: list[float]) -> dict[str, float]:
    """Return the mean with Student's 95% interval."""
    mean, error = float(np.mean(values)), float(scipy.stats.sem(values))
    half = error * scipy.stats.t.ppf(0.975, len(values) - 1)
    return {"mean": mean, "low": mean - half, "high": mean + half}
