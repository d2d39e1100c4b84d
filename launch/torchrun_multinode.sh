#!/usr/bin/env bash
# Runs a verb of irdscale on several machines with torchrun: the same command on each, within ten minutes.
#   NODES=2 HEAD=node1 bash launch/torchrun_multinode.sh train my.yaml output=runs/two
# HEAD is the first machine's name or address as the others reach it, or HOST:PORT (29500 unless given). One rank a GPU,
# or RANKS of them, on each. Set NODE_RANK, 0 on the first, where a machine cannot tell by HEAD whether it is the first;
# WAIT=1800 if they are to wait half an hour for each other.
# Needs what launch/install.sh needs on each, and models, data and an output folder that all share; train.deepspeed needs
# a C++ compiler too. The result is printed where rank 0 is, which may be any of them. Interrupted, or ended by a lost
# machine, the same command on all goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

extras=""
[[ "$*" != *train.deepspeed=* ]] || extras=deepspeed
bash "$root/launch/install.sh" $extras
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m irdscale.nodes "$@"
