#!/usr/bin/env bash
# Everything that must be seen on a GPU, in stages of under 8 minutes: tests, methods, memory, throughput, waits, accuracy.
#
#     bash benchmarks/gpu.sh                      # all stages, then output/gpu/gpu.md
#     bash benchmarks/gpu.sh tests memory         # some of them; --list says which there are
#     bash benchmarks/gpu.sh --dry                # the same on the CPU, with tiny sizes: does it run at all?
#
# Needs the packages of pyproject.toml with the extra `test`, and neither a network nor a dataset. Nothing has to be
# installed beside them: the programs find this copy of d2kd. The exit status is 1 if a stage failed, which stops no other.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
