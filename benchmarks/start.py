#!/usr/bin/env python
"""How long the programs take to answer: help, lists, typing errors, and `import d2kd`.

    python benchmarks/start.py
    PYTHONPATH=<another checkout> python benchmarks/start.py    # the same of another version

Each is run in a process of its own; the first run is left out, as it reads the files from the disk. Processor time is
what a busy machine does not change.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

CLI = ["-m", "d2kd.cli"]
RECIPE = ["train", "--config-file", "PhotoDigits/retinanet_student.yaml"]
COMMANDS = {
    "import d2kd": ["-c", "import d2kd"],
    "d2kd --help": [*CLI, "--help"],
    "d2kd train --help": [*CLI, "train", "--help"],
    "d2kd report --help": [*CLI, "report", "--help"],
    "d2kd list methods": [*CLI, "list", "methods"],
    "d2kd list recipes": [*CLI, "list", "recipes"],
    "d2kd list architectures": [*CLI, "list", "architectures"],
    "d2kd list backbones": [*CLI, "list", "backbones"],
    "d2kd trian (an unknown command)": [*CLI, "trian"],
    "d2kd train --confg-file x (an unknown option)": [*CLI, "train", "--confg-file", "x"],
    "d2kd train --config-file none.yaml (no such file)": [*CLI, "train", "--config-file", "none.yaml"],
    "d2kd train ... SOLVER.BASE_LT 1 (an unknown key)": [*CLI, *RECIPE, "SOLVER.BASE_LT", "1"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds of a process: on the wall, and of processors."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median is shown (default: 5)")
    args = parser.parse_args()
    print("| | seconds | of a processor |\n| --- | ---: | ---: |")
    for name, arguments in COMMANDS.items():
        measure(arguments)
        times = [measure(arguments) for _ in range(args.repeats)]
        wall, processor = (statistics.median(column) for column in zip(*times))
        print(f"| `{name}` | {wall:.2f} | {processor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
