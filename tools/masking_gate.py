#!/usr/bin/env python
"""Measures what masking a teacher does to its features, before any training: the same as `d2kd masking-gate`."""

from d2kd.cli.masking_gate import run

if __name__ == "__main__":
    run()
