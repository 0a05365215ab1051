#!/usr/bin/env bash
# Pre-trains the embedded model with tune itself and puts it into assets/demo/model.
#
#   assets/demo/pretrain.sh CORPUS.jsonl.xz WORK_FOLDER [--set train.epochs=1 ...]
#
# What follows WORK_FOLDER goes to `tune train`.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
[ $# -ge 2 ] || { sed -n '2,6p' "$0"; exit 2; }
corpus=$1 work=$2
shift 2

cd "$root"
cargo build --release --bin tune --example prepare_demo --example pack_demo
target/release/examples/prepare_demo "$corpus" "$work"
export TUNE_HOME="$work/home"
target/release/tune train assets/demo/RUN.toml \
    --set model.id="$work/model" --set data.train="$work/train.jsonl" "$@"
run=$(ls -td "$TUNE_HOME"/runs/*/ | head -n 1)
target/release/examples/pack_demo "$run/model" assets/demo/model
cp "$work/model/tokenizer.json" assets/demo/model/
