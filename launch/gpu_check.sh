#!/usr/bin/env bash
# Proves irdscale on the GPUs of this machine: kernels, exactness, a search, all ranks with ZeRO-3, and the benchmark.
#   bash launch/gpu_check.sh
# Needs a GPU, and irdscale with all that it needs in .venv, in python3, or in the Python that PYTHON names. No network;
# at most 6 minutes on an H100. Prints as it goes, with seconds, so that a run that is cut short tells as well.
# Exit code 1: a check failed; 2: there is no GPU, or no irdscale. A bar that is missed is marked, and fails nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  [[ ! -x .venv/bin/python ]] || python=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
there='import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("irdscale")))'
if ! "$python" -c "$there"; then
  echo "gpu_check.sh: found no torch and irdscale in $python; expected them installed (bash launch/install.sh)" >&2
  exit 2
fi
card="$("$python" -m irdscale.cli.gpu_check card)"
echo "$card"

failed=""
# check NAME SECONDS COMMAND...: runs it, for so long at most, and goes on.
check() {
  local name="$1" limit="$2" code=0 begin="$SECONDS"
  shift 2
  echo "== $name, from $SECONDS s on"
  timeout --foreground --kill-after=20 "$limit" "$@" || code=$?
  took=$((SECONDS - begin))
  if [[ "$code" -ne 0 ]]; then
    failed+="${failed:+, }$name (exit code $code)"
    echo "FAILED $took s  $name: exit code $code (124: longer than $limit s)"
  fi
}

shopt -s nullglob
kernels=(tests/*/kernel_checks.py)
if [[ "${#kernels[@]}" -eq 0 ]] || ! "$python" -c 'import pytest' 2>/dev/null; then
  echo "== kernels: left out, for there is no tests/ here, or no pytest"
else
  check kernels 150 env TRITON_INTERPRET=0 "$python" -m pytest -q -p no:cacheprovider "${kernels[@]}"
  if [[ "$took" -gt 60 ]]; then mark="MISSED"; else mark="met   "; fi
  echo "$mark $took s  checks of the kernels, asked <= 60 s"
fi
check exactness 120 "$python" -m irdscale.cli.gpu_check exact
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
check search 120 "$python" -m irdscale.cli.gpu_check search "$scratch"
gpus="${card%% x *}"
launcher=(-m torch.distributed.run --standalone --nproc-per-node "$gpus")
check ranks 180 "$python" "${launcher[@]}" -m irdscale.cli.gpu_check ranks
check benchmark 300 "$python" -m irdscale bench gpu

if [[ -n "$failed" ]]; then
  echo "gpu_check.sh: failed after $SECONDS s: $failed"
  exit 1
fi
echo "gpu_check.sh: all checks passed in $SECONDS s; rows marked MISSED are bars that are not met"
