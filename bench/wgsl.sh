#!/usr/bin/env bash
# The WGSL engine on a card: checks the fast paths against the CPU engine, then times products, attention and training
# steps. BIN is the `wgsl` example, built elsewhere if need be: cargo build --release --example wgsl
# PROBE is the `wgsl_probe` example: `attention-phases` isolates what is wrong on cooperative matrices, `candidates` times
# every candidate tile of products beside PyTorch; both need python3 with numpy (and torch).
# bash bench/wgsl.sh [check products attention MODEL:BATCH:SEQUENCE:RECOMPUTE ...]
set -u
cd "$(dirname "$0")/.."
BIN=${BIN:-target/release/examples/wgsl}
PROBE=${PROBE:-target/release/examples/wgsl_probe}
STEPS=${STEPS:-8}
if [ $# -eq 0 ]; then
    set -- check products attention 135m:8:512:none 1b:4:2048:none 8b:2:2048:all
fi
"$BIN" adapters
for row in "$@"; do
    echo "== $row"
    case "$row" in
    check) TUNE_COOPERATIVE_ATTENTION=1 timeout 200 "$BIN" "$row" ;;
    attention-phases) timeout 100 python3 bench/wgsl_probe.py "$PROBE" attention ;;
    candidates) timeout 200 python3 bench/wgsl_probe.py "$PROBE" products small pytorch ;;
    products | attention) timeout 200 "$BIN" "$row" ;;
    *)
        IFS=: read -r model batch sequence recompute <<<"$row"
        timeout 200 "$BIN" step "$model" "$batch" "$sequence" "$STEPS" "$recompute" ${PROFILE:+profile}
        ;;
    esac
done
