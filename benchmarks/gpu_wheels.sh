#!/usr/bin/env bash
# Collects the packages that benchmarks/gpu.sh needs next to torch, transformers, timm, peft and tensorboard, for a machine without a
# network: a folder of wheels to carry along and to pass there with --wheels. Run it where pip works.
#   bash benchmarks/gpu_wheels.sh DIR [PYTHON_VERSION]      e.g. wheels 3.12 (default: this python's)
# numba is left out, because only the decoding of images needs it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:?usage: bash benchmarks/gpu_wheels.sh DIR [PYTHON_VERSION]}"
python="${PYTHON:-python3}"
version="${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
mkdir -p "$folder"
rm -f "$folder"/*.whl

requirement() { grep -m 1 "^$1[<>=]" "$root/requirements.txt"; }  # with the versions that the project takes
# DeepSpeed comes as source only; its operations are compiled when used, and none is used here.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps -w "$folder" "$(requirement deepspeed)"
pip_download() {
  "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$folder" "$@"
}
pip_download "$(requirement braceexpand)" "$(requirement webdataset)" "$(requirement simplejpeg)" \
  hjson py-cpuinfo einops msgpack ninja psutil tqdm
# pydantic with its core, whose versions go together
"$python" -m pip download -q --only-binary=:all: --implementation cp --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$folder" pydantic
echo "$(ls "$folder" | wc -l) wheels for Python $version in $folder, $(du -sh "$folder" | cut -f1)"
