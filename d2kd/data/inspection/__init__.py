"""What the datasets of a run hold, and what in them looks like a mistake."""

from .datasets import inspect_datasets
from .report import Report

__all__ = ["Report", "inspect_datasets"]
