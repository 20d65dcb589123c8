"""Prints results in a form to paste into a table, and compares them with the expected results of a config."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from d2lite.config import CfgNode

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping[str, Mapping[str, float]]) -> None:
    """Logs the main metrics of each task as comma-separated lines; those of single classes are left out."""
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info("copypaste: %s=%s", task, metrics)
            continue
        main = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(main))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in main.values()))


def verify_results(cfg: CfgNode, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compares `results` with `cfg.TEST.EXPECTED_RESULTS`, a list of `[task, metric, value, tolerance]`.

    Returns:
        True. A difference above the tolerance, or a value that is not finite, is logged and ends the program.

    Raises:
        SystemExit: if a result is not as expected.
    """
    failures = []
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = results.get(task, {}).get(metric)
        if actual is None:
            failures.append(f"{task}/{metric} is missing")
        elif not np.isfinite(actual) or abs(actual - expected) > tolerance:
            failures.append(f"{task}/{metric} is {actual}, expected {expected} +- {tolerance}")
    if failures:
        logger.error("Result verification failed: %s", "; ".join(failures))
        logger.error("Expected results: %s", cfg.TEST.EXPECTED_RESULTS)
        logger.error("Actual results: %s", dict(results))
        sys.exit(1)
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info("Results verification passed.")
    return True


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Turns `{"a": {"b": 1}}` into `{"a/b": 1}`, at any depth."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": item for name, item in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat
