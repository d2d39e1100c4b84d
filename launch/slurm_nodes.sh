#!/usr/bin/env bash
# Runs a verb of irdscale with torchrun on all nodes of the SLURM allocation that it is called in, as it is by
# launch/slurm_search.sbatch and launch/slurm_train.sbatch.
#   bash launch/slurm_nodes.sh search my.yaml output=runs/slurm
# Needs what these need. SIGUSR1, which SLURM sends before the time is up, puts the job back into the queue.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

again() {
  echo "slurm_nodes.sh: the time is nearly up; the job goes back into the queue, and on from what it has saved" >&2
  scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1

extras=""
[[ "$*" != *train.deepspeed=* ]] || extras=deepspeed
# Here once, before the nodes look for it at the same time.
bash "$root/launch/install.sh" $extras
# Not by name, which a node may take for its loopback. Two jobs on a node need two ports.
address="$(hostname -I | cut -d ' ' -f 1)"
export NODES="$SLURM_JOB_NUM_NODES" HEAD="$address:$((20000 + SLURM_JOB_ID % 10000))"
srun --nodes="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none \
  bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$0" "$@"' "$root/launch/torchrun_multinode.sh" "$@" &
# A signal ends the first wait alone.
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do
  code=0
  wait $! || code=$?
done
exit "$code"
