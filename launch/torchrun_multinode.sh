#!/usr/bin/env bash
# Runs a verb of irdscale on several machines with torchrun: the same command on each, within ten minutes.
#   NODES=2 HEAD=node1 bash launch/torchrun_multinode.sh train my.yaml output=runs/two
# HEAD is the first machine's name or address as the others reach it, or HOST:PORT (29500 unless given). One rank a GPU,
# or RANKS of them, on each. Set NODE_RANK, 0 on the first, where a machine cannot tell by HEAD whether it is the first,
# or several run on one; WAIT=1800 if they are to wait half an hour for each other.
# Needs what launch/install.sh needs on each, and models, data and an output folder that all share.
# The result is printed where rank 0 is, which may be any of them. Interrupted, or ended by a lost
# machine, the same command on all goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

refuse() {
  echo "torchrun_multinode.sh: $1" >&2
  exit 2
}
[[ -n "${NODES:-}" ]] || refuse "NODES: missing; expected the number of nodes"
[[ "${HEAD:-}" =~ ^[^:]+(:[0-9]+)?$ ]] \
  || refuse "HEAD: found '${HEAD:-}'; expected the first node's HOST or HOST:PORT"
for name in NODES RANKS WAIT; do
  [[ "${!name:-1}" =~ ^[1-9][0-9]*$ ]] || refuse "$name: found '${!name}'; expected a whole number of at least 1"
done
extras=""
[[ "$*" != *train.deepspeed=* ]] || extras=deepspeed
bash "$root/launch/install.sh" $extras
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# What the first node's end breaks, torch would tell with the addresses of its code.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
ranks="${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
conf="join_timeout=${WAIT:-600},read_timeout=${WAIT:-600}"
[[ -z "${NODE_RANK:-}" ]] || conf+=",is_host=$((NODE_RANK == 0))"
exec python -m irdscale.distributed.multinode --nnodes="$NODES" --nproc-per-node="$ranks" \
  --rdzv-backend=c10d --rdzv-id=irdscale --rdzv-endpoint="$HEAD" --rdzv-conf="$conf" -m irdscale "$@"
