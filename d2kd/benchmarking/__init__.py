"""What models cost to run: time, memory, parameters and multiply-adds, of checkpoints and of exported files."""

from .measuring import Measurement, Settings, measure
from .results import benchmark_table, write_results
from .subjects import Subject, SubjectError, find_subjects

__all__ = [
    "Measurement",
    "Settings",
    "Subject",
    "SubjectError",
    "benchmark_table",
    "find_subjects",
    "measure",
    "write_results",
]
