#!/usr/bin/env python
"""Writes the student of a training checkpoint as a plain Detectron2 checkpoint: the same as `d2kd export`."""

from d2kd.cli.export_student import run
from d2kd.interrupts import ending_at_interrupts

if __name__ == "__main__":
    with ending_at_interrupts():
        run()
