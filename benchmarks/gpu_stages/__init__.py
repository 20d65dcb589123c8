"""The stages of benchmarks/gpu.sh. A file each has what they measure."""

from .base import Context, Recorder, Stage, end_programs_when_terminated, forked, started
from .registry import STAGES, chosen
from .table import write_table

__all__ = [
    "STAGES",
    "Context",
    "Recorder",
    "Stage",
    "chosen",
    "end_programs_when_terminated",
    "forked",
    "started",
    "write_table",
]
