#!/usr/bin/env bash
# Sets up, checks style and types, and runs the tests. Arguments go to pytest; with arguments only the tests run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy
  # a process for each core: most tests take one, and many wait for programs that they start
  set -- --numprocesses auto --dist worksteal
fi
exec python -m pytest "$@"
