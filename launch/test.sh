#!/usr/bin/env bash
# Installs irdscale with the tools for development into .venv, checks format, lint, imports and types, and runs the tests.
#   bash launch/test.sh              everything, two tests at a time
#   bash launch/test.sh tests/masks  arguments go to pytest, one test at a time (-n 2 --dist worksteal: two)
# Needs what launch/install.sh needs. No GPU, and no hub is asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Each of the two may start two ranks, or a Ray cluster: more would wait for each other on a small machine.
[[ $# -gt 0 ]] || set -- -n 2 --dist worksteal

bash launch/install.sh dev
export HF_HUB_OFFLINE=1
.venv/bin/python -m ruff format --check irdscale tests
.venv/bin/python -m ruff check irdscale tests
.venv/bin/lint-imports --config pyproject.toml
.venv/bin/python -m mypy
.venv/bin/python -m pytest "$@"
