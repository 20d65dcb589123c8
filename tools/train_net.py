#!/usr/bin/env python
"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given: the same as `d2kd train`."""

from d2kd.cli.train import run

if __name__ == "__main__":
    run()
