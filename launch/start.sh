#!/usr/bin/env bash
# bash launch/start.sh stageN [options]: starts a stage through the DeepSpeed launcher (launch/stageN.sh calls it).
# The launcher's own options may stand anywhere; the others go to stages/stageN.py.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
stage="$1"
shift
[ -x "$root/.venv/bin/deepspeed" ] && export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

launcher=()
script=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) exec python "$root/stages/$stage.py" --help ;;
    --no_ssh | --no_ssh_check | --force_multi | --bind_cores_to_rank)
      launcher+=("$1") ;;
    --hostfile=* | --include=* | --exclude=* | --num_nodes=* | --num_gpus=* | --num_accelerators=* | --master_addr=* | \
    --master_port=* | --node_rank=* | --launcher=* | --launcher_args=* | --ssh_port=* | --bind_core_list=* | --log_level=*)
      launcher+=("$1") ;;
    -H | --hostfile | -i | --include | -e | --exclude | --num_nodes | --num_gpus | --num_accelerators | --master_addr | \
    --master_port | --node_rank | --launcher | --launcher_args | --ssh_port | --bind_core_list | --log_level)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      launcher+=("$1" "$2")
      shift ;;
    *) script+=("$1") ;;
  esac
  shift
done
if ! command -v deepspeed >/dev/null; then
  echo "error: deepspeed is not on PATH; run 'source launch/setup.sh requirements.txt' first" >&2
  exit 2
fi

# A signal to stop goes to the ranks themselves, which save and end; the launcher then ends with their exit code.
children() { cat "/proc/$1/task/$1/children" 2>/dev/null; }
pass_on() {
  local child rank passed=
  for child in $(children "$running"); do
    tr '\0' ' ' < "/proc/$child/cmdline" 2>/dev/null | grep -q deepspeed.launcher.launch || continue
    for rank in $(children "$child"); do kill "-$1" "$rank" 2>/dev/null && passed=yes; done
    [ -n "$passed" ] || kill -TERM "$child" 2>/dev/null
  done
  # Several nodes: the launcher itself tells them. No rank yet: there is nothing to save.
  [ -n "$passed" ] || kill -TERM "$running" 2>/dev/null
}
deepspeed "${launcher[@]}" "$root/stages/$stage.py" "${script[@]}" &
running=$!
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap 'kill -INT "$running" 2>/dev/null' INT
while true; do
  code=0
  wait "$running" || code=$?
  kill -0 "$running" 2>/dev/null || exit "$code"
done
