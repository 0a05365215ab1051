#!/usr/bin/env bash
# Training steps on a card, ours and then the rival's, in one call: bash bench/gpu.sh ROW...
# A row is MODEL:METHOD:BATCH:SEQUENCE:RECOMPUTE, such as 8b:qlora:2:2048:all; without rows, those of the design's table.
# Ours is .gpu/step, made by `bash tests/gpu.sh build`. The rival is Unsloth through PEERS (a folder with peers.py), left
# out with a line where PEERS is not set or Unsloth is not installed. PROFILE=1 prints where our time goes.
set -u
cd "$(dirname "$0")/.."
STEPS=${STEPS:-10}
if [ $# -eq 0 ]; then
    set -- 135m:lora:8:512:none 135m:full:8:512:none 1b:lora:4:2048:none 1b:full:4:2048:none 8b:lora:2:2048:none \
        8b:lora:2:2048:all 8b:qlora:2:2048:all 8b:qlora:8:2048:all
fi
rival=no
if [ -n "${PEERS:-}" ]; then
    if python3 -c 'import unsloth' >/dev/null 2>&1; then rival=yes; else echo "rival left out: Unsloth is not installed"; fi
else
    echo "rival left out: PEERS is not set"
fi
results=$(mktemp)
for row in "$@"; do
    IFS=: read -r model method batch sequence recompute <<<"$row"
    echo "== $row"
    timeout 150 .gpu/step "$model" "$method" "$batch" "$sequence" "$STEPS" "$recompute" ${PROFILE:+profile} 2>&1 | tee -a "$results"
    if [ "$rival" = yes ]; then
        if [ "$recompute" = none ]; then export NO_GC=1; else unset NO_GC; fi
        timeout 300 python3 "$PEERS/peers.py" unsloth "$model" "$method" "$batch" "$sequence" "$STEPS" 2>&1 | grep '^RESULT' | tee -a "$results"
    fi
done
python3 - "$results" <<'PYTHON'
import json, sys
print(f"{'case':34} {'peer':14} {'tok/s':>9} {'GiB':>7} {'of floor':>9} {'first step':>11}")
for line in open(sys.argv[1]):
    if line.startswith("RESULT "):
        r = json.loads(line[7:])
        case = f"{r['model']} {r['method']} {r['batch']}x{r['seq']} {r.get('recompute', '')}"
        used = r.get("used_gib", r.get("alloc_gib"))
        print(f"{case:34} {r['peer']:14} {r['tok_s']:9,.0f} {used:7.2f} {r.get('share_of_floor', ''):>9} {r.get('first_step_s', ''):>11}")
PYTHON
