#!/usr/bin/env bash
# The WGSL engine on a card, beside PyTorch on the same card; needs no build there.
#   bash bench/wgsl.sh [ROW ...]
# check portable-check            the fast paths and core WebGPU against the CPU engine: before a time is believed
# products[:ROWS] attention       rates; ROWS of square,long,nf4,lora,small; TRACE=1 prints every candidate kernel's
# MODEL:BATCH:SEQUENCE:RECOMPUTE[:METHOD]  a training step (135m, 1b, 8b; none, cheap, all; lora, qlora, full); PROFILE=1
#                                 prints the time per operation
# peer-products peer-attention peer:MODEL:BATCH:SEQUENCE:RECOMPUTE   the same in PyTorch, Transformers and PEFT (bf16)
# leak                            2,000 steps of the demo model, host and device memory at 200 and at the end
# doctor                          what `tune doctor` says of the adapter
# golden                          SmolLM2's golden LoRA steps, schedule and full, in portable f32, fast f32 and f16; GOLDEN is the
#                                 test program, TUNE_SMOLLM2 and TUNE_ASSETS say where the model and the numbers are
# attention-phases candidates     experiments of `wgsl_probe`
# TUNE_WGPU_PLAIN=1 leaves cooperative matrices out, as on adapters that have none; PRECISION=f16 or f32 says in which type then.
# BIN is the example `wgsl`, TUNE the program, PROBE the example `wgsl_probe`; python3 with torch, transformers and peft. What
# is printed goes to LOG too, line by line.
set -uo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-target/release/examples/wgsl}
TUNE=${TUNE:-target/release/tune}
PROBE=${PROBE:-target/release/examples/wgsl_probe}
GOLDEN=${GOLDEN:-.gpu/golden}
STEPS=${STEPS:-8}
LOG=${LOG:-/dev/null}
if [ $# -eq 0 ]; then
    set -- check portable-check products:square,long,nf4 peer-products attention peer-attention \
        135m:8:512:none peer:135m:8:512:all 1b:4:2048:none peer:1b:4:2048:all 8b:2:2048:all peer:8b:2:2048:all \
        1b:4:2048:none:qlora 135m:8:512:none:full doctor leak
fi
row() {
    local model batch sequence recompute method
    case "$1" in
    check) TUNE_COOPERATIVE_ATTENTION=2 timeout "${LIMIT:-100}" "$BIN" check | grep -v '^ok' ;;
    portable-check) PRECISION=f32 TUNE_WGPU_PORTABLE=1 timeout "${LIMIT:-100}" "$BIN" check | grep -v '^ok' ;;
    products*)
        IFS=, read -ra rows <<<"${1#products}"
        timeout "${LIMIT:-150}" "$BIN" products "${rows[@]#:}"
        ;;
    attention) timeout "${LIMIT:-60}" "$BIN" attention ;;
    peer-products | peer-attention) timeout "${LIMIT:-60}" python3 bench/wgsl_peer.py "${1#peer-}" ;;
    peer:*)
        IFS=: read -r _ model batch sequence recompute <<<"$1"
        timeout "${LIMIT:-120}" python3 bench/wgsl_peer.py step "$model" "$batch" "$sequence" "$STEPS" "$recompute"
        ;;
    leak) timeout "${LIMIT:-180}" python3 bench/wgsl_leak.py "$TUNE" "${DEVICE:-wgpu:0}" 2000 ;;
    doctor) timeout "${LIMIT:-60}" "$TUNE" doctor | fold -w 230 | grep -A6 wgpu ;;
    golden)
        export TUNE_TEST_DEVICE=${DEVICE:-wgpu:0}
        local each=(timeout "${LIMIT:-200}" "$GOLDEN" --nocapture --test-threads=1)
        TUNE_WGPU_PORTABLE=1 TUNE_TEST_PRECISION=f32 "${each[@]}" smollm2_takes &&
            TUNE_TEST_PRECISION=f32 "${each[@]}" smollm2_takes &&
            TUNE_TEST_PRECISION=f16 "${each[@]}" half_precision
        ;;
    attention-phases) timeout "${LIMIT:-100}" python3 bench/wgsl_probe.py "$PROBE" attention ;;
    candidates) timeout "${LIMIT:-200}" python3 bench/wgsl_probe.py "$PROBE" products small pytorch ;;
    *)
        IFS=: read -r model batch sequence recompute method <<<"$1"
        timeout "${LIMIT:-150}" "$BIN" step "$model" "$batch" "$sequence" "$STEPS" "$recompute" "${method:-lora}" ${PROFILE:+profile}
        ;;
    esac
    local code=$?
    [ $code -eq 0 ] || echo "$1 ended with $code"
}
{
    "$BIN" adapters
    for name in "$@"; do
        begun=$SECONDS
        echo "== $name"
        row "$name" 2>&1
        echo "-- $((SECONDS - begun)) s"
    done
} 2>&1 | tee "$LOG"
