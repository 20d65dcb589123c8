"""The stages of benchmarks/gpu.sh. A file each has what they measure."""

from .base import Context, Recorder, Stage, forked, started
from .registry import STAGES, chosen
from .table import write_table

__all__ = ["STAGES", "Context", "Recorder", "Stage", "chosen", "forked", "started", "write_table"]
