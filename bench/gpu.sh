#!/usr/bin/env bash
# Training steps on a card, ours and the rival's, in one call: bash bench/gpu.sh ROW...
# A row is MODEL:METHOD:BATCH:SEQUENCE:MEMORY, such as 8b:qlora:2:2048:all; MEMORY is what is recomputed (none, cheap,
# all), `free` for the planner's choice, or a number of GiB for the planner to keep to. SEQUENCE `rows` takes the rows of
# bench/alpaca_lengths.json. Without rows, those of the design's table. RIVAL=only leaves ours out, RIVAL=no the rival.
# Ours is .gpu/step, made by `bash tests/gpu.sh build`. The rival is Unsloth through bench/peers/; its packages are in the
# Python at hand or in the folder PEERS (made by bench/peers/make_site.sh), else it is left out with a line.
# PROFILE=1 prints where our time goes. RESULTS names a file that results are added to and the table is made from: two
# calls with the same file stand side by side. PEER_LIMIT: seconds that one row of the rival may take (300).
# `bash bench/gpu.sh curve` trains the embedded model for 100 updates in bf16 and in fp8, and prints both loss curves.
# `bash bench/gpu.sh longest` runs a step of the longest row that the plan fits into a 24 GB card: Llama 8B, QLoRA of rank 32.
set -u
cd "$(dirname "$0")/.."
STEPS=${STEPS:-10}
PEER_LIMIT=${PEER_LIMIT:-300}
if [ $# -eq 0 ]; then
    set -- 135m:lora:8:512:none 135m:lora:8:512:0.58 135m:full:8:512:free 1b:lora:4:2048:none 1b:lora:4:2048:3.55 \
        1b:full:4:2048:free 8b:lora:2:2048:none 8b:lora:2:2048:16.45 8b:qlora:2:2048:6.75 8b:qlora:8:2048:9.85 \
        8b:qlora:1:32768:13.9 8b:qlora:8:rows:6.05 135m:lora:8:rows:free
fi
if [ "${1:-}" = curve ]; then
    work=$(mktemp -d)
    export TUNE_HOME="$work/home" XDG_RUNTIME_DIR="$work/run"
    mkdir -p "$XDG_RUNTIME_DIR" && chmod 700 "$XDG_RUNTIME_DIR"
    for precision in bf16 fp8; do
        .gpu/tune train --model demo --data demo --set engine.device=cuda --set engine.precision=$precision \
            --set train.steps=100 --set train.eval_every=50 --json >"$work/$precision" || exit 1
    done
    exec python3 - "$work/bf16" "$work/fp8" <<'PYTHON'
import json, sys
def curve(path):
    events = [json.loads(line) for line in open(path)]
    steps = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
    return [steps[step] for step in sorted(steps)], [e["loss"] for e in events if e["event"] == "eval"]
(plain, held), (fp8, held_fp8) = curve(sys.argv[1]), curve(sys.argv[2])
print(f"{'updates':>9} {'bf16':>8} {'fp8':>8} {'difference':>11}")
for first in range(0, len(plain), 10):
    a, b = (sum(c[first:first + 10]) / len(c[first:first + 10]) for c in (plain, fp8))
    print(f"{first + 1:4}-{min(first + 10, len(plain)):<4} {a:8.4f} {b:8.4f} {b / a - 1:+11.2%}")
apart = [abs(b / a - 1) for a, b in zip(plain, fp8)]
print(f"updates apart by {sum(apart) / len(apart):.2%} on average, {max(apart):.2%} at most; {len(plain)} of them")
print("held-out loss:", ", ".join(f"{a:.4f} and {b:.4f}" for a, b in zip(held, held_fp8)))
PYTHON
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
# The rival reads its weights from files: in memory where there is room for them (8B: 16 GB).
if [ -z "${MODELS:-}" ] && [ "$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -1)" -ge 24 ] 2>/dev/null; then
    export MODELS=/dev/shm/tune-peer-models
fi
results=${RESULTS:-$(mktemp)}
touch "$results"
log=$(mktemp)

# One row of the rival: its result line, or the end of what it said.
peer() { # SCRIPT ARGUMENT...
    local begun=$SECONDS
    timeout "$PEER_LIMIT" python3 "bench/peers/$1" "${@:2}" >"$log" 2>&1
    local code=$?
    if grep -E '^(RESULT|ROWS) ' "$log" | tee -a "$results" | grep .; then
        echo "   rival: $((SECONDS - begun)) s"
    else
        echo "   rival: $1 ended with $code after $((SECONDS - begun)) s:"
        tail -5 "$log" | cut -c1-300
    fi
}

for row in "$@"; do
    IFS=: read -r model method batch sequence memory <<<"$row"
    echo "== $row"
    if [ "$rival" != only ]; then
        timeout 150 .gpu/step "$model" "$method" "$batch" "$sequence" "$STEPS" "$memory" ${PROFILE:+profile} 2>&1 | tee -a "$results"
    fi
    # The rival has no such mode.
    [ "$rival" = no ] || [ "$method" = fp8 ] && continue
    # Its scripts time what is there on the first call of a model: make it first.
    begun=$SECONDS
    if ! timeout "$PEER_LIMIT" python3 bench/peers/peers.py hf "$model" init 1 1 1 >"$log" 2>&1; then
        echo "   rival: its $model weights could not be made:"
        tail -5 "$log" | cut -c1-300
        continue
    fi
    echo "   rival: weights there after $((SECONDS - begun)) s"
    if [ "$sequence" = rows ]; then
        peer peers_rows.py "$model" "$method" 15 0 bench/alpaca_lengths.json
        continue
    fi
    if [ "$memory" = none ]; then export NO_GC=1; else unset NO_GC; fi
    peer peers.py unsloth "$model" "$method" "$batch" "$sequence" "$STEPS"
done
python3 - "$results" <<'PYTHON'
import json, sys
apart = []
print(f"{'case':34} {'peer':14} {'speed':>15} {'GiB':>7} {'planned':>8} {'of floor':>9} {'first step':>11} {'ratio':>6}")
rows = []
for line in open(sys.argv[1]):
    kind, _, text = line.partition(" ")
    if kind in ("RESULT", "ROWS"):
        r = json.loads(text)
        # The rival without recomputation stands beside ours with everything kept.
        kept = r.get("recompute") == "none" or "nogc" in r.get("peer", "")
        key = (r["model"], r["method"], r.get("batch", 8), r.get("seq", "rows"), kept)
        rows.append((key, kind, r, r["tok_s"] if kind == "RESULT" else r["rows_s"]))
rivals = {key: speed for key, _, r, speed in rows if r.get("peer", "unsloth").startswith("unsloth")}
for key, kind, r, speed in rows:
    ours = r.get("peer") == "tune"
    case = f"{r['model']} {r['method']} {r.get('batch', 8)}x{r.get('seq', 'rows')} {r.get('recompute', '')}"
    used = r.get("used_gib", r.get("alloc_gib", r.get("peak_gib", 0)))
    text = f"{speed:,.0f} tok/s" if kind == "RESULT" else f"{speed:.1f} rows/s"
    ratio = f"{speed / rivals[key]:.2f}" if ours and key in rivals else ""
    print(f"{case:34} {r.get('peer', 'unsloth'):14} {text:>15} {used:7.2f} {r.get('planned_gib', ''):>8} "
          f"{r.get('share_of_floor', ''):>9} {r.get('first_step_s', ''):>11} {ratio:>6}")
    if ours and "planned_gib" in r:
        off = abs(r["used_gib"] - r["planned_gib"])
        apart.append((off / max(0.02 * r["used_gib"], 150 / 1024), off, case))
if apart:
    worst = max(apart)
    print(f"plan and card within max(2%, 150 MiB): {sum(a[0] <= 1 for a in apart)} of {len(apart)} rows; "
          f"furthest apart, by {worst[1] * 1024:.0f} MiB: {worst[2]}")
PYTHON
