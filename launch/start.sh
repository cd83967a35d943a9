#!/usr/bin/env bash
# bash launch/start.sh stageN [options]: starts a stage through the DeepSpeed launcher (launch/stageN.sh and
# "tinygptv-ds train" call it). The launcher's own options may be given anywhere, with hyphens or underscores; the others
# are passed on to stages/stageN.py.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
stage="$1"
shift
[ -x "$root/.venv/bin/deepspeed" ] && export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# If a node dies silently, ssh, and with it the launcher, would otherwise wait for it for a quarter of an hour.
export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=15 -oServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}"

launcher=()
script=()
hostfile=
master_port=29500
ssh_port=
note() {  # keep those options of the launcher that are needed to find the ranks later
  case "$1" in
    -H | --hostfile) hostfile="$2" ;;
    --master_port) master_port="$2" ;;
    --ssh_port) ssh_port="$2" ;;
  esac
}
while [ $# -gt 0 ]; do
  name="${1%%=*}"
  option="$1"
  if [ "${name#--}" != "$name" ]; then  # --num-gpus is --num_gpus, as DeepSpeed spells it
    spelled="--$(printf %s "${name#--}" | tr - _)"
    option="$spelled${1#"$name"}"
  fi
  case "$option" in
    -h | --help) exec python "$root/stages/$stage.py" --help ;;
    --no_ssh | --no_ssh_check | --force_multi | --bind_cores_to_rank)
      launcher+=("$option") ;;
    --hostfile=* | --include=* | --exclude=* | --num_nodes=* | --num_gpus=* | --num_accelerators=* | --master_addr=* | \
    --master_port=* | --node_rank=* | --launcher=* | --launcher_args=* | --ssh_port=* | --bind_core_list=* | --log_level=*)
      note "$spelled" "${1#*=}"
      launcher+=("$option") ;;
    -H | --hostfile | -i | --include | -e | --exclude | --num_nodes | --num_gpus | --num_accelerators | --master_addr | \
    --master_port | --node_rank | --launcher | --launcher_args | --ssh_port | --bind_core_list | --log_level)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      note "$option" "$2"
      launcher+=("$option" "$2")
      shift ;;
    *) script+=("$1") ;;
  esac
  shift
done
if ! command -v deepspeed >/dev/null; then
  echo "error: deepspeed is not on PATH; activate the environment that has it, or create one: source $root/launch/setup.sh requirements.txt" >&2
  exit 2
fi

# A mistake in options or recipe is reported here at once; the launcher would first take seconds.
python "$root/stages/$stage.py" --check-recipe "${script[@]}" || exit

# A stop signal goes to the ranks themselves, which save and exit; the launcher then exits with their code.
children() { cat "/proc/$1/task/$1/children" 2>/dev/null; }
pass_on_over_pdsh() {  # on every node, the children of this job's per-node launcher, identified by its port and script
  local hosts launch="^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port=$master_port .*/stages/$stage.py"
  hosts="$(awk '!/^#/ && NF { print $1 }' "$hostfile" | paste -sd,)"
  PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND -oBatchMode=yes ${ssh_port:+-p $ssh_port}" \
    timeout 30 pdsh -w "$hosts" "pkill -$1 -P \"\$(pgrep -d, -f '$launch')\" && echo passed" 2>/dev/null | grep -q passed
}
pass_on() {
  local child rank command passed=
  for child in $(children "$running"); do
    command="$(tr '\0' ' ' < "/proc/$child/cmdline" 2>/dev/null)"
    case "$command" in
      pdsh\ * | */pdsh\ *) [ -n "$hostfile" ] && pass_on_over_pdsh "$1" && passed=yes ;;
      *deepspeed.launcher.launch*)
        for rank in $(children "$child"); do kill "-$1" "$rank" 2>/dev/null && passed=yes; done
        [ -n "$passed" ] || kill -TERM "$child" 2>/dev/null ;;
    esac
  done
  [ -n "$passed" ] || kill -TERM "$running" 2>/dev/null  # no rank yet: there is nothing to save
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
