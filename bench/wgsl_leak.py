#!/usr/bin/env python3
"""A training loop in miniature: the demo model takes STEPS steps through the ordinary command, and the worker's memory is
looked at meanwhile. python3 bench/wgsl_leak.py TUNE [DEVICE] [STEPS]; ends with 1 if host memory grew by more than 8 MiB
or the card's by more than 2 MiB between step 200 and the last but 50: after that the worker may be leaving."""
import json, os, subprocess, sys, tempfile, time

program = os.path.abspath(sys.argv[1])
device = sys.argv[2] if len(sys.argv) > 2 else "wgpu:0"
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 2000


def workers():
    """Processes of the program that are workers, and their resident memory in MiB."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.path.realpath(f"/proc/{pid}/exe") == program and pid != str(watcher.pid):
                with open(f"/proc/{pid}/status") as status:
                    found += [int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS")]
        except OSError:
            pass
    return max(found, default=None)


def on_card():
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
        return float(done.stdout.splitlines()[0])
    except (OSError, IndexError, ValueError):
        return None


home = tempfile.mkdtemp()
sets = [f"train.steps={steps}", "train.eval_every=0", "train.save_every=0", "data.max_length=256", "train.batch=16"]
command = [program, "train", "--model", "demo", "--data", "demo", "--json"]
for entry in [*sets, f"engine.device={device}"]:
    command += ["--set", entry]
watcher = subprocess.Popen(command, env={**os.environ, "TUNE_HOME": home}, stdout=subprocess.PIPE, text=True)
seen, looks = [], [200, *range(500, steps - 50, 500), steps - 50]
begun = time.time()
for line in watcher.stdout:
    event = json.loads(line)
    if event["event"] == "step" and looks and event["step"] >= looks[0]:
        looks.pop(0)
        seen.append((event["step"], workers(), on_card()))
        print("step {}: worker {:.1f} MiB, card {} MiB".format(seen[-1][0], seen[-1][1] or float("nan"), seen[-1][2]), flush=True)
    elif event["event"] in ("failed", "finished", "warning"):
        print(line[:300].strip(), flush=True)
code = watcher.wait()
if code or len(seen) < 3 or seen[0][1] is None or seen[-1][1] is None:
    sys.exit(f"the run ended with {code} after {len(seen)} looks")
host, card = seen[-1][1] - seen[0][1], (seen[-1][2] or 0) - (seen[0][2] or 0)
print(f"{steps} steps in {time.time() - begun:.0f} s; from step {seen[0][0]} to {seen[-1][0]}: host {host:+.1f} MiB, card {card:+.0f} MiB")
sys.exit(1 if host > 8 or card > 2 else 0)
