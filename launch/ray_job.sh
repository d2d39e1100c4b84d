#!/usr/bin/env bash
# Submits a search to a running Ray cluster, with this checkout's code and configurations, and shows its log.
#   RAY_ADDRESS=http://127.0.0.1:8265 bash launch/ray_job.sh configs/quickstart.yaml output="$HOME/runs/job"
# Needs what launch/install.sh needs; a cluster whose nodes have irdscale at this version and share the output folder, and
# whose head was started with ray[default] and is reached at RAY_ADDRESS (ray dashboard launch/ray_cluster.yaml forwards
# the port). Models and data must be where the configuration says on all nodes. Interrupted, the search runs on; failed or
# stopped (ray job stop), the same command goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ " $* " != *" output=/"* ]]; then
  echo "ray_job.sh: found '$*'; expected CONFIG and output=DIR, an absolute path that all nodes share" >&2
  exit 2
fi
bash "$root/launch/install.sh" ray
# The cluster's token is in the home folder, or in RAY_AUTH_TOKEN.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# The code goes without what is made here; changed code thus needs no new install.
exec "$root/.venv/bin/ray" job submit --working-dir "$root" \
  --runtime-env-json '{"excludes": [".git", ".venv", "/runs"]}' -- \
  python -m irdscale search "$@" search.runner=ray
