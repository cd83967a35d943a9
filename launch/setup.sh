#!/usr/bin/env bash
# Creates the project's virtual environment once, installs the project itself (editable) and the given requirements into it,
# and puts it on PATH. Source it, do not run it:
#   source launch/setup.sh [requirements file ...]
# In a later shell, "source .venv/bin/activate" is enough.
# PYTHON chooses the interpreter (3.11 to 3.13); TINYGPTV_NO_VENV=1 uses the python on PATH as it is.
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_set_up() {
  local python="${PYTHON:-python3}" venv="$_root/.venv" file stamp
  export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
  [ -n "${TINYGPTV_NO_VENV:-}" ] && return 0
  command -v sha256sum >/dev/null || sha256sum() { shasum -a 256; }  # macOS
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 to 3.13; name one with PYTHON=/path/to/python3.11" >&2
    return 2
  fi
  for file in "$@" "$_root/pyproject.toml"; do
    stamp="$venv/.installed-$(echo "$file" | sed "s|$_root/||" | tr / -)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(sha256sum < "$file")" ]; then
      [ -x "$venv/bin/python" ] || { echo "making $venv"; "$python" -m venv "$venv" || return 2; }
      if [ "$file" = "$_root/pyproject.toml" ]; then  # the command tinygptv-ds; its requirements are in the files before
        echo "installing $_root into $venv"
        "$venv/bin/python" -m pip install --disable-pip-version-check -q --no-deps -e "$_root" || return 2
      else
        echo "installing $(basename "$(dirname "$file")")/$(basename "$file") into $venv (a few minutes the first time)"
        "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar on -q -r "$file" || return 2
      fi
      sha256sum < "$file" > "$stamp"
    fi
  done
  export PATH="$venv/bin:$PATH"
}
_set_up "$@"
