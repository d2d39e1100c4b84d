#!/usr/bin/env bash
# Runs a verb of irdscale on several ranks of this machine with torchrun: one rank a GPU, or RANKS of them.
#   RANKS=2 bash launch/torchrun.sh train configs/quickstart.yaml output=runs/two train.deepspeed=configs/deepspeed/zero2.json
# Needs what launch/install.sh needs (deepspeed for train.deepspeed). Interrupted, the same command goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

extras=""
[[ "$*" != *train.deepspeed=* ]] || extras=deepspeed
bash "$root/launch/install.sh" $extras
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks="${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
exec python -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m irdscale "$@"
