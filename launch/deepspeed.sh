#!/usr/bin/env bash
# Runs a verb of irdscale on several ranks of this machine with DeepSpeed's launcher: one rank a GPU, or RANKS of them.
#   RANKS=2 bash launch/deepspeed.sh train configs/quickstart.yaml output=runs/two train.deepspeed=configs/deepspeed/zero3.json
# Needs what launch/install.sh needs. Interrupted, the same command goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

bash "$root/launch/install.sh" deepspeed
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks="${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
# DeepSpeed's launcher dies of a signal and leaves its ranks running. They get it from here, save their state, and end.
set -m
deepspeed --num_gpus "$ranks" --module irdscale "$@" &
trap 'kill -TERM -- "-$!" 2>/dev/null || true' INT TERM
code=0
wait "$!" || code=$?
while kill -0 -- "-$!" 2>/dev/null; do sleep 0.2; done
exit "$code"
