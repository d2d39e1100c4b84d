#!/usr/bin/env bash
# Runs a verb of irdscale on the machines of a hostfile with DeepSpeed's launcher, over pdsh and ssh.
#   HOSTFILE=my_hosts bash launch/deepspeed_hostfile/run.sh train my.yaml train.deepspeed=configs/deepspeed/zero3.json
# The hostfile, the one beside this script unless HOSTFILE names another, has one line a machine: HOST slots=N. The ranks
# meet at the first (at its first address unless MASTER_ADDR names another; port MASTER_PORT, or 29500).
# Needs pdsh here; ssh without a password to each, whose shell is bash; the checkout at the same place on all (a shared
# folder, or the same path with launch/install.sh deepspeed run on each), and models, data and an output
# folder that all share. Of the environment, NCCL_*, UCX_* and PYTHON* are passed on, and what a file .deepspeed_env says.
# Before any work each machine is asked whether it is there. Interrupted, or ended by a lost machine, the same command
# goes on.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$folder/../.." && pwd)"
hostfile="${HOSTFILE:-$folder/hostfile}"

refuse() {
  echo "run.sh: $1" >&2
  exit 2
}
bash "$root/launch/install.sh" deepspeed
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
command -v pdsh >/dev/null || refuse "found no pdsh, by which DeepSpeed starts ranks on other machines; install it"
[[ -r "$hostfile" ]] || refuse "$hostfile: cannot read the hostfile"
! bad="$(grep -nvE '^\s*(#|$)|^[[:alnum:]_.][[:alnum:]_.@-]*\s+slots=[1-9]' "$hostfile")" \
  || refuse "$hostfile:${bad%%$'\n'*}: expected 'HOST slots=N', such as 'node1 slots=8'"
hosts="$(grep -oE '^[[:alnum:]_.@-]+' "$hostfile")" \
  || refuse "$hostfile: found no hosts; expected lines such as 'node1 slots=8'"
twice="$(sort <<<"$hosts" | uniq -d)"
[[ -z "$twice" ]] || refuse "$hostfile: ${twice//$'\n'/, }: given twice; expected one line a host"

# DeepSpeed asks the first alone.
reached=()
for host in $hosts; do
  {
    said="$(ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" true 2>&1)" \
      || refuse "$host: cannot be reached: ${said##*$'\n'}; expected ssh to it without a password"
  } &
  reached+=($!)
done
for host in "${reached[@]}"; do wait "$host" || exit 2; done

# -N leaves out the hosts' names before each line, and -k ends all when one fails.
exec deepspeed --hostfile "$hostfile" --force_multi --launcher_args="-N -k" --venv_script "$root/.venv/bin/activate" \
  --master_addr "${MASTER_ADDR:-}" --master_port "${MASTER_PORT:-29500}" --module irdscale "$@"
