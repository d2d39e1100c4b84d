#!/usr/bin/env bash
# Runs a verb of irdscale on the machines of a hostfile with DeepSpeed's launcher, over plain ssh (no pdsh).
#   HOSTFILE=my_hosts bash launch/deepspeed_hostfile/run.sh train my.yaml train.deepspeed=configs/deepspeed/zero3.json
# The hostfile, the one beside this script unless HOSTFILE names another, has one line a machine: HOST slots=N. The ranks
# meet at the first (at its first address unless MASTER_ADDR names another; port MASTER_PORT, or 29500).
# Needs ssh without a password to each; hostfile and checkout at the same place on all (a shared folder, or the same path
# with launch/install.sh deepspeed run on each), a C++ compiler, and models, data and an output folder that all share.
# Before any work each machine is asked whether it is there and has DeepSpeed. Interrupted, or ended by a lost machine,
# the same command goes on.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$folder/../.."

bash "$root/launch/install.sh" deepspeed
export PATH="$(cd "$root" && pwd)/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m irdscale.hostfile "${HOSTFILE:-$folder/hostfile}" "$@"
