#!/usr/bin/env bash
# The CPU engine beside PyTorch + PEFT: the golden LoRA batches of SmolLM2-135M, twenty steps a turn, four turns each,
# one after the other in one run. Prints median seconds a step, peak memory, and the ratios (targets: 0.8 and 0.7).
#
#   PYTHON=/path/to/venv/bin/python bench/cpu.sh
#
# PYTHON has torch, transformers and peft (tests/reference/make_venv.sh makes such an environment). The model is
# $TUNE_SMOLLM2 or models/smollm2-135m; the batches are in $TUNE_ASSETS/golden or ../shared/assets/golden.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet
exec "${PYTHON:-python3}" bench/cpu_peer.py both \
    --model "${TUNE_SMOLLM2:-models/smollm2-135m}" \
    --golden "${TUNE_ASSETS:-../shared/assets}/golden" \
    --tune target/release/tune
