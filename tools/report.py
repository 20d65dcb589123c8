#!/usr/bin/env python
"""Compares finished runs: tables, curves and pictures of detections: the same as `d2kd report`."""

from d2kd.cli.report import run

if __name__ == "__main__":
    run()
