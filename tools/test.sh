#!/usr/bin/env bash
# Sets up, checks style and types, and runs the tests. Arguments go to pytest; with arguments only the tests run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy
  # a process for each core, but no more than memory has room for: most tests take one core
  set -- --numprocesses auto --maxprocesses 4 --dist worksteal
fi
exec python -m pytest "$@"
