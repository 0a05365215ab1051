#!/usr/bin/env bash
# The CUDA engine's tests on a machine with a card, which needs no Rust:
#   bash tests/gpu.sh build    here: builds the test and benchmark programs and puts them, stripped, into .gpu/
#   bash tests/gpu.sh          there: runs them, with .gpu/ carried along; prints "N passed, N failed"
# TUNE_CASES limits the operations to cases whose name contains it; MEMCHECK=1 runs them under compute-sanitizer too.
set -u
cd "$(dirname "$0")/.."

if [ "${1:-}" = build ]; then
    set -e
    mkdir -p .gpu
    binary=$(cargo test --release --no-run --test cuda --message-format=json 2>/dev/null |
        python3 -c 'import json,sys
for line in sys.stdin:
    entry = json.loads(line)
    if entry.get("executable") and entry["target"]["name"] == "cuda": print(entry["executable"])')
    cargo build --release --example step
    cp "$binary" .gpu/cuda
    cp target/release/examples/step .gpu/step
    strip .gpu/cuda .gpu/step
    ls -la .gpu
    exit
fi

export TUNE_GPU=1 RUST_BACKTRACE=1
nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader
log=$(mktemp)
.gpu/cuda --nocapture --test-threads=1 2>&1 | tee "$log"
passed=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
failed=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
# A run that died has no result line.
grep -q '^test result: ' "$log" || failed=$((failed + 1))
if [ "${MEMCHECK:-0}" = 1 ]; then
    if compute-sanitizer --tool memcheck --error-exitcode 9 .gpu/cuda every_operation >"$log.memcheck" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
    grep -E 'ERROR SUMMARY|Invalid|=========     at' "$log.memcheck" | head -20
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
