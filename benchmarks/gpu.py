#!/usr/bin/env python
"""What must be seen on a GPU, in stages that can be run alone; see benchmarks/gpu.sh.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py tests methods-float16 --output output/gpu
    python benchmarks/gpu.py table               # gpu.md again, from the files that are there

Every stage runs in a process of its own with a time limit and writes DIR/STAGE.json as it goes, so what is finished
stays when it is stopped. DIR/gpu.md, a table of all files there, is written after each.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_stages import STAGES, Recorder, chosen, end_programs_when_terminated, forked, started, write_table

#: Seconds a stage has after its own limit, to write what it has.
GRACE = 15


def main() -> int:
    """Runs the stages; returns the exit status."""
    args = arguments()
    if args.list:
        for stage in STAGES.values():
            sys.stdout.write(f"{stage.name:18} {stage.what}\n")
        sys.stdout.write(f"{'table':18} gpu.md from the JSON files of the stages\n")
        return 0
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch asks for it
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if args.in_this_process:
        end_programs_when_terminated()
        return STAGES[args.in_this_process].work(output, args.dry, args.limit)
    names = chosen(args.stages)
    if args.dry:
        import d2kd.engine  # noqa: F401  (once, for all stages)
    for name in names:
        sys.stderr.write(f"{name}: {STAGES[name].what}\n")
        run_stage(name, output, args.dry, args.limit)
        write_table(output)
    failed = write_table(output)
    sys.stderr.write(f"{output / 'gpu.md'}\n")
    bad = [name for name in failed if not names or name in names]
    if bad:
        sys.stderr.write(f"failed: {', '.join(bad)}\n")
    return 1 if bad else 0


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="all if none is named; `table` is none of them")
    parser.add_argument("--list", action="store_true", help="show the stages")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes and one or two iterations")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), metavar="DIR", help="default: output/gpu")
    parser.add_argument("--limit", type=int, default=450, metavar="SECONDS", help="of a stage; default: 450")
    parser.add_argument("--in-this-process", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        chosen(args.stages)
    except ValueError as error:
        parser.error(str(error))
    return args


def run_stage(name: str, output: Path, dry: bool, limit: int) -> None:
    """Runs one stage in processes of its own, and ends them all at its limit."""
    command = [__file__, "--in-this-process", name, "--output", str(output), "--limit", str(limit)]
    Recorder(output, name, dry).start()  # a file of an earlier run must not stand for this one
    with open(output / f"{name}.log", "w", encoding="utf-8") as log:
        start = forked if dry else started
        process = start([*command, *(["--dry"] if dry else [])], os.environ, log, log)
        try:
            code = process.wait(limit + GRACE)
            why = "" if code == 0 else f"ended with status {code}: {_last_line(output / f'{name}.log')}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit + GRACE} s"
        finally:
            _end(process)
    Recorder(output, name, dry).finish(why)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"see {path.name}"


def _end(process: Any) -> None:
    """Ends what is left of a stage's processes: asked to, it ends its programs first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return


if __name__ == "__main__":
    sys.exit(main())
