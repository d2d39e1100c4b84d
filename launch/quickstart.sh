#!/usr/bin/env bash
# Installs irdscale into .venv and runs a complete small search: configs/quickstart.yaml, in a few minutes on 2 cores.
#   bash launch/quickstart.sh
# Needs what launch/install.sh needs; model and data are then local, and no hub is asked. The result is in
# runs/quickstart, with report.html to look at. Interrupted, it goes on; finished, it shows the result again.
# Arguments are changes of the configuration, such as output=runs/second train.learning_rate=0.002; a first one that ends
# in .yaml is another configuration: configs/quickstart_llm.yaml searches a small language model, in 2 to 3 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
export HF_HUB_OFFLINE=1
config=configs/quickstart.yaml
if [[ "${1:-}" == *.yaml ]]; then
  config="$1"
  shift
fi
output="runs/$(basename "$config" .yaml)"
if [[ -f "$output/result.json" && $# -eq 0 ]]; then
  echo "quickstart.sh: the search is done already; remove $output to run it again" >&2
fi
.venv/bin/python -m irdscale search "$config" "$@"
