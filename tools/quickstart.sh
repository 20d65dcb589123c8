#!/usr/bin/env bash
# Sets up, then trains a teacher, a baseline and distilled students on PhotoDigits and writes output/quickstart/report.md.
# Safe to interrupt and to run again: finished parts are not repeated. Arguments go to tools/quickstart.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python tools/quickstart.py "$@"
