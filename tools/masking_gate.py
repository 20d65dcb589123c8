#!/usr/bin/env python
"""Measures what masking a teacher does to its features, before any training: the same as `d2kd masking-gate`."""

from d2kd.cli.masking_gate import run
from d2kd.interrupts import ending_at_interrupts

if __name__ == "__main__":
    with ending_at_interrupts():
        run()
