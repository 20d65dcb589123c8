"""A plugin of pytest: a JSON line in $D2KD_TEST_ROWS for each test, as it ends, so that a stopped run loses none."""

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Writes what a test came to: its call, or what went wrong or was skipped before or after that."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    message = "" if report.passed else str(report.longrepr).strip().splitlines()[-1] if report.longrepr else ""
    row = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2), "message": message[:300]}
    with open(os.environ["D2KD_TEST_ROWS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
