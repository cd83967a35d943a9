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
exec deepspeed "${launcher[@]}" "$root/stages/$stage.py" "${script[@]}"
