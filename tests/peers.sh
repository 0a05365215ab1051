#!/usr/bin/env bash
# Compares with PEFT and Transformers, in a virtual environment with CPU PyTorch: an adapter trained here loads there
# and gives the same logits, and the other way round.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${TUNE_PEERS_VENV:-.venv-peers}
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import torch, transformers, peft' 2>/dev/null; then
  bash tests/reference/make_venv.sh "$venv"
fi
cargo build --release --quiet --bins --example logits
"$venv/bin/python" tests/peers.py
