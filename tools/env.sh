# Sourced by the other scripts: makes .venv in the project's root, or reuses it, and activates it.
# PYTHON chooses the interpreter (default python3). Installing is repeated only when pyproject.toml changes.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "d2kd needs Python 3.10 or newer; '$python' is $("$python" -V 2>&1). Set PYTHON=/path/to/python3." >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=".venv/installed-$(cksum < pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "Installing d2kd and what it needs into .venv (some minutes the first time) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
  rm -f .venv/installed-*
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
