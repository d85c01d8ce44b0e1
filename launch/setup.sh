# Make .venv and install what the project needs; sourced by quickstart.sh and test.sh after `root` is set.
# shellcheck shell=bash
: "${root:?set root to the repository before sourcing this file}"

# fail MESSAGE: one line, and out.
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

# find_python: the first Python 3.10 to 3.12 on this machine.
find_python() {
  local name
  for name in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "no Python 3.10, 3.11 or 3.12 found; install one (macOS: brew install python@3.12), or name it: PYTHON=/path/to/python3.11"
}

# setup_venv REQUIREMENTS: done once for each state of the requirements files; a stamp in .venv remembers it.
setup_venv() {
  local requirements="$1" stamp="$root/.venv/.installed-${1%.txt}" wanted log="$root/.venv/install.log" base
  wanted="$(cat "$root"/requirements*.txt)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "      .venv is up to date"
    return
  fi
  if [ ! -x "$root/.venv/bin/python" ]; then
    base="$(find_python)"
    echo "      making .venv with $base"
    "$base" -m venv --clear "$root/.venv" >/dev/null 2>&1 ||
      { rm -rf "$root/.venv"; fail "$base cannot make a virtual environment; install python3-venv"; }
  fi
  echo "      installing $requirements (some minutes; log: .venv/install.log)"
  "$root/.venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check \
    -r "$root/$requirements" >"$log" 2>&1 ||
    fail "pip could not install $requirements: $(grep -E '^ERROR' "$log" | head -n 1 | cut -c1-300) (log: $log)"
  printf '%s' "$wanted" >"$stamp"
}
