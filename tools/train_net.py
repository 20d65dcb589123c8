#!/usr/bin/env python
"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given: the same as `d2kd train`."""

from d2kd.cli.train import run
from d2kd.interrupts import ending_at_interrupts

if __name__ == "__main__":
    with ending_at_interrupts():
        run()
