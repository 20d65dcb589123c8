"""Runners for behaviour recorded from Detectron2, in tests/data/parity."""
