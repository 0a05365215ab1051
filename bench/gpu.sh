#!/usr/bin/env bash
# Training steps on a card, ours and the rival's, in one call: bash bench/gpu.sh ROW...
# A row is MODEL:METHOD:BATCH:SEQUENCE:MEMORY, such as 8b:qlora:2:2048:all; MEMORY is what is recomputed (none, cheap,
# all), `free` for the planner's choice, or a number of GiB for the planner to keep to. SEQUENCE `rows` takes the rows of
# bench/alpaca_lengths.json, BATCH of them an update. The row `process` times a whole process: start, loading 8B from
# memory, 11 steps. Without rows, those of the design's table.
# Ours is .gpu/step (and .gpu/tune), made by `bash tests/gpu.sh build`; it runs on the first card, one row after the other.
# The rival is Unsloth through bench/peers/; its packages are in the Python at hand or in the folder PEERS (made by
# bench/peers/make_site.sh), else it is left out with a line. GPUS=4 (or CARDS="0 1 2 3"): its rows run at the same time on
# the other cards, a queue each, and on the first when ours are done; with one card, after ours. QUEUE names a folder that
# says which rows are taken: a call with the same folder and rows, RIVAL=only and a card of its own helps with the rest.
# RIVAL=only leaves ours out, RIVAL=no the rival; HF=yes adds the rows that the table has of Hugging Face's own stack.
# LIMIT: seconds after which what still runs is ended and the table printed; PEER_LIMIT: of one row of the rival (300).
# PROFILE=1 prints where our time goes. RESULTS names a file that results are added to and the table is made from: two
# calls with the same file stand side by side. LOGS names a folder that keeps what every row of the rival said.
# `bash bench/gpu.sh curve` trains the embedded model for 100 updates in bf16 and in fp8, and prints both loss curves.
# `bash bench/gpu.sh longest` runs a step of the longest row that the plan fits into a 24 GB card: Llama 8B, QLoRA of rank 32.
# `bash bench/gpu.sh kernels` times every kernel and product of the 8B shapes beside what the card does at most.
set -u
cd "$(dirname "$0")/.."
repository=$PWD
STEPS=${STEPS:-10}
PEER_LIMIT=${PEER_LIMIT:-300}
CARDS=${CARDS:-$(seq -s ' ' 0 $((${GPUS:-1} - 1)))}
deadline=$(($(date +%s) + ${LIMIT:-86400}))
if [ $# -eq 0 ]; then
    set -- 8b:lora:2:2048:16.45 1b:lora:4:2048:3.55 135m:lora:8:512:0.597 8b:qlora:8:rows:6.05 8b:qlora:2:2048:6.75 \
        8b:qlora:8:2048:9.85 8b:lora:2:2048:none 1b:full:4:2048:7.65 8b:qlora:1:32768:13.9 135m:lora:8:rows:free \
        135m:full:8:512:free 8b:qlora:91:rows:6.85 8b:fp8:2:2048:none 135m:lora:8:512:none 1b:lora:4:2048:none \
        1b:full:4:2048:free process
fi
if [ "${1:-}" = kernels ]; then
    exec .gpu/step kernels
fi
if [ "${1:-}" = curve ]; then
    work=$(mktemp -d)
    export TUNE_HOME="$work/home" XDG_RUNTIME_DIR="$work/run"
    mkdir -p "$XDG_RUNTIME_DIR" && chmod 700 "$XDG_RUNTIME_DIR"
    for precision in bf16 fp8; do
        .gpu/tune train --model demo --data demo --set engine.device=cuda --set engine.precision=$precision \
            --set train.steps=100 --set train.eval_every=50 --json >"$work/$precision" || exit 1
    done
    exec python3 bench/table.py curve "$work/bf16" "$work/fp8"
fi
if [ "${1:-}" = longest ]; then
    # What a 24 GB card has beside the driver's context.
    STEPS=1 RIVAL=no exec bash "$0" 8b:qlora@32:1:78475:22.9
fi
[ -n "${PEERS:-}" ] && export PYTHONPATH="$PEERS${PYTHONPATH:+:$PYTHONPATH}"
rival=${RIVAL:-yes}
if [ "$rival" != no ] && ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("unsloth") is None)'; then
    echo "rival left out: Unsloth is not installed"
    rival=no
fi
work=$(mktemp -d)
logs=${LOGS:-$work/logs}
taken=${QUEUE:-$work/queue}
mkdir -p "$logs" "$taken"
# The rival reads its weights from files: in memory where there is room for them (8B: 16 GB).
if [ -z "${MODELS:-}" ]; then
    export MODELS="$work/models"
    [ "$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -1)" -ge 24 ] 2>/dev/null && MODELS=/dev/shm/tune-peer-models
fi
results=${RESULTS:-$work/results}
touch "$results"

left() { echo $((deadline - $(date +%s))); }

# Adds a line to the results: several rows may end at once.
result() { flock "$results" -c "cat >>'$results'"; }

# A model's random weights in files, made once.
weights() { # MODEL
    (
        flock 9
        [ -f "$MODELS/$1/tokenizer.json" ] && exit
        timeout "$PEER_LIMIT" python3 "$repository/bench/peers/peers.py" hf "$1" init 1 1 1
    ) 9>"$taken/weights.$1" >"$logs/weights.$1.log" 2>&1
}

# Fewer steps of a long row: it is measured well enough, and takes seconds.
steps() { # BATCH SEQUENCE
    if [ "$2" != rows ] && [ $(($1 * $2)) -ge 32768 ] && [ "$STEPS" -gt 3 ]; then echo 3; else echo "$STEPS"; fi
}

# The rival's rows that stand beside ours. Without recomputation it is measured on the 8B shape, as in the design's table.
jobs=()
add() {
    local job
    for job in ${jobs[@]+"${jobs[@]}"}; do [ "$job" = "$1" ] && return; done
    jobs+=("$1")
}
if [ "$rival" != no ]; then
    for row in "$@"; do
        IFS=: read -r model method batch sequence memory <<<"$row"
        # The rival has no such mode; a whole process is one of its rows anyway.
        [ "$row" = process ] || [ "$method" = fp8 ] && continue
        if [ "$sequence" = rows ]; then
            add "rows:$model:$method:$([ "$batch" -gt 8 ] && echo 1 || echo 0)"
        elif [ "$memory" = none ] && [ "$model" = 8b ]; then
            add "nogc:$model:$method:$batch:$sequence"
        else
            add "unsloth:$model:$method:$batch:$sequence"
        fi
    done
    if [ "${HF:-}" = yes ]; then
        for job in 135m:lora:8:512 8b:qlora:2:2048 8b:lora:2:2048 1b:full:4:2048; do add "hf:$job"; done
    fi
fi

# One row of the rival on a card: its result line, or the end of what it said.
peer() { # CARD JOB
    local kind model method batch sequence script arguments begun limit code log
    IFS=: read -r kind model method batch sequence <<<"$2"
    log="$logs/$2.log"
    log=${log//:/-}
    begun=$(date +%s)
    export CUDA_VISIBLE_DEVICES=$1 TORCHINDUCTOR_CACHE_DIR="$work/inductor.$1" TRITON_CACHE_DIR="$work/triton.$1"
    export UNSLOTH_COMPILE_LOCATION="$work/unsloth.$1"
    unset NO_GC
    [ "$kind" = nogc ] && export NO_GC=1
    if ! weights "$model"; then
        echo "   rival: its $model weights could not be made: $(tail -2 "$logs/weights.$model.log" | cut -c1-300)"
        return
    fi
    case $kind in
        rows) script=peers_rows.py arguments=("$model" "$method" 15 "$batch" "$repository/bench/alpaca_lengths.json") ;;
        hf) script=peers.py arguments=(hf "$model" "$method" "$batch" "$sequence" "$(steps "$batch" "$sequence")") ;;
        # 8 steps and 3 before them are those of the row that times a process.
        *) script=peers.py arguments=(unsloth "$model" "$method" "$batch" "$sequence" "$(STEPS=8 steps "$batch" "$sequence")") ;;
    esac
    local started
    started=$(date +%s)
    limit=$(($(left) - 10))
    [ "$limit" -gt "$PEER_LIMIT" ] && limit=$PEER_LIMIT
    mkdir -p "$work/in.$1"
    (cd "$work/in.$1" && exec timeout -k 5 "$limit" python3 "$repository/bench/peers/$script" "${arguments[@]}") >"$log" 2>&1
    code=$?
    if grep -E '^(RESULT|ROWS) ' "$log" >"$work/line.$1"; then
        result <"$work/line.$1"
        [ "$2" = unsloth:8b:lora:2:2048 ] && [ "$code" = 0 ] &&
            echo "PROCESS {\"peer\": \"unsloth\", \"seconds\": $(($(date +%s) - started))}" | result
        echo "   rival: $2 on card $1, $(($(date +%s) - begun)) s: $(cut -c1-220 "$work/line.$1")"
    else
        echo "   rival: $2 on card $1 ended with $code after $(($(date +%s) - begun)) s:"
        tail -4 "$log" | cut -c1-300
    fi
}

# Takes rows of the rival that no other queue has taken, as long as there is time for one.
queue() { # CARD
    local index=0 job
    for job in ${jobs[@]+"${jobs[@]}"}; do
        index=$((index + 1))
        [ "$(left)" -ge 50 ] || return
        mkdir "$taken/$index" 2>/dev/null && peer "$1" "$job"
    done
}

# Start, loading 8B from memory and 11 steps, as a user runs them: with a cold cache of kernels, then with a warm one.
process() {
    local begun run
    weights 8b || { echo "   8b weights could not be made"; return; }
    export TUNE_HOME="$work/home" XDG_RUNTIME_DIR="$work/run" XDG_CACHE_HOME="$work/cache"
    mkdir -p "$XDG_RUNTIME_DIR" && chmod 700 "$XDG_RUNTIME_DIR"
    python3 -c 'import json, random
generator = random.Random(3407)
for _ in range(64): print(json.dumps({"input_ids": [generator.randrange(3, 300) for _ in range(2048)]}))' >"$work/ids.jsonl"
    for run in cold warm; do
        begun=$(date +%s.%N)
        if ! timeout 90 .gpu/tune train --model "$MODELS/8b" --data "$work/ids.jsonl" --set engine.device=cuda \
            --set method.kind=lora --set train.optimizer=adamw8bit --set train.batch=2 --set data.max_length=2048 \
            --set data.eval=0 --set train.steps=11 --set train.save_every=1000 --json >"$work/process" 2>"$work/process.err"; then
            tail -3 "$work/process.err"
            return
        fi
        python3 bench/table.py process "$begun" "$run" "$work/process" | tee >(result)
    done
}

workers=()
read -r first others <<<"$CARDS"
if [ "$rival" != no ]; then
    for card in $others; do
        queue "$card" &
        workers+=($!)
        # The first rows are of different models: each queue makes one's weights.
        sleep 1
    done
fi
if [ "$rival" != only ]; then
    export CUDA_VISIBLE_DEVICES=$first
    for row in "$@"; do
        echo "== $row"
        if [ "$(left)" -lt 30 ]; then
            echo "   left out: the time is over"
            continue
        fi
        if [ "$row" = process ]; then
            process
            continue
        fi
        IFS=: read -r model method batch sequence memory <<<"$row"
        timeout 150 .gpu/step "$model" "$method" "$batch" "$sequence" \
            "$(steps "$batch" "$sequence")" "$memory" ${PROFILE:+profile} 2>&1 | tee "$work/ours"
        grep -E '^(RESULT|ROWS) ' "$work/ours" | result
    done
fi
if [ "$rival" != no ]; then
    queue "$first" &
    workers+=($!)
fi
for worker in ${workers[@]+"${workers[@]}"}; do wait "$worker"; done
python3 bench/table.py "$results"
