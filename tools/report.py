#!/usr/bin/env python
"""Compares finished runs: tables, curves and pictures of detections: the same as `d2kd report`."""

from d2kd.cli.report import run
from d2kd.interrupts import ending_at_interrupts

if __name__ == "__main__":
    with ending_at_interrupts():
        run()
