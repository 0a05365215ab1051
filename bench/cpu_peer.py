#!/usr/bin/env python3
"""Twenty LoRA steps on the golden batches: tune's CPU engine, and PyTorch + PEFT, each in a process of its own; or tune's
engine on weights as stored, in NF4 and in 8-bit integers.

    python bench/cpu_peer.py both --model FOLDER --golden FOLDER --tune BINARY     both, and the ratios
    python bench/cpu_peer.py peer --model FOLDER --golden FOLDER                   PyTorch + PEFT alone
    python bench/cpu_peer.py weights --model FOLDER --golden FOLDER --tune BINARY  tune: as stored, nf4, int8

The same rows, labels, adapter, optimizer and thread count. PyTorch computes the batches as they are, two rows padded
to 128 tokens; tune packs the rows without their padding. They take turns, and the medians are over all turns. Peak memory is the kernel's VmHWM of the process that trains.
"""
import argparse, json, os, re, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 20
# They take turns: what else the machine does falls on both.
ROUNDS = 4

RUN = """\
[model]
id = "{model}"

[data]
train = "{rows}"
format = "tokens"
shuffle = false
eval = 0.0
max_length = 128

[method]
kind = "lora"
rank = 8
alpha = 16
init = "{adapter}"

[train]
steps = 20
batch = 2
learning_rate = 2e-4
schedule = "constant"
warmup = 0
weight_decay = 0.0
max_grad_norm = 0.0
eval_every = 0
save_every = 0

[engine]
device = "cpu"
"""


def peak_bytes(process="self"):
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def write_rows(golden, path):
    """The batches' rows without padding, in the format `tokens`."""
    from safetensors.numpy import load_file
    batches = load_file(golden / "batches.safetensors")
    with open(path, "w") as out:
        for ids, labels, mask in zip(*(batches[key].reshape(-1, 128) for key in ("input_ids", "labels", "attention_mask"))):
            length = int(mask.sum())
            out.write(json.dumps({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()}) + "\n")


def peer(model_folder, golden):
    import torch, peft
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batches = load_file(golden / "batches.safetensors")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, golden / "lora_init", is_trainable=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    seconds, losses = [], []
    for step in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        batch = {key: batches[key][step] for key in ("input_ids", "labels", "attention_mask")}
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes(), "torch": torch.__version__}))


def ours(tune, model_folder, golden, weights="auto"):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows, run = folder / "rows.jsonl", folder / "run.toml"
        write_rows(golden, rows)
        run.write_text(RUN.format(model=model_folder.resolve(), rows=rows, adapter=(golden / "lora_init").resolve()))
        home = folder / "home"
        peaks = [0]
        done = threading.Event()

        def watch():
            while not done.wait(0.05):
                for lock in home.glob("runs/*/worker.lock"):
                    try:
                        peaks[0] = max(peaks[0], peak_bytes(re.search(r'"process":\s*(\d+)', lock.read_text()).group(1)))
                    except (AttributeError, OSError):
                        pass

        watcher = threading.Thread(target=watch)
        watcher.start()
        environment = {**os.environ, "TUNE_HOME": str(home)}
        result = subprocess.run([tune, "train", run, "--json", "--set", f"model.weights={weights}"], env=environment, capture_output=True, text=True)
        done.set()
        watcher.join()
        if result.returncode != 0:
            sys.exit(f"tune train failed ({result.returncode}): {result.stdout[-2000:]}\n{result.stderr}")
        events = [json.loads(line) for line in result.stdout.splitlines()]
        steps = [event for event in events if event["event"] == "step"]
        return {
            "seconds": [step["seconds"] for step in steps],
            "losses": [step["loss"] for step in steps],
            "tokens": [step["tokens"] for step in steps],
            "peak_bytes": peaks[0],
        }


def both(arguments):
    command = [sys.executable, __file__, "peer", "--model", arguments.model, "--golden", arguments.golden]
    turns = []
    for turn in range(ROUNDS):
        mine = ours(arguments.tune, arguments.model, arguments.golden)
        theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        turns.append((mine, theirs))
        medians = [statistics.median(side["seconds"]) for side in turns[-1]]
        print(f"turn {turn + 1}: {medians[0]:.3f} s and {medians[1]:.3f} s, {medians[0] / medians[1]:.2f}", flush=True)
    worst = max(abs(a - b) / abs(b) for mine, theirs in turns for a, b in zip(mine["losses"], theirs["losses"]))
    print(f"{ROUNDS} x {STEPS} LoRA steps on {len(os.sched_getaffinity(0))} threads, two rows an update; "
          f"losses differ by {worst:.1e} at most")
    medians = [statistics.median(second for turn in turns for second in turn[side]["seconds"]) for side in (0, 1)]
    peaks = [max(turn[side]["peak_bytes"] for turn in turns) for side in (0, 1)]
    print(f"{'':26}{'tune':>10}{'PyTorch':>10}{'ratio':>8}  target")
    print(f"{'median step, seconds':26}{medians[0]:10.3f}{medians[1]:10.3f}{medians[0] / medians[1]:8.2f}    0.80")
    print(f"{'peak memory, MiB':26}{peaks[0] / 2**20:10.0f}{peaks[1] / 2**20:10.0f}{peaks[0] / peaks[1]:8.2f}    0.70")


def weights(arguments):
    kinds = ["auto", "nf4", "int8"]
    turns = []
    for turn in range(ROUNDS):
        turns.append([ours(arguments.tune, arguments.model, arguments.golden, kind) for kind in kinds])
        medians = [statistics.median(side["seconds"]) for side in turns[-1]]
        print(f"turn {turn + 1}: " + ", ".join(f"{kind} {median:.3f} s" for kind, median in zip(kinds, medians)), flush=True)
    print(f"{'weights':10}{'median step':>14}{'ratio':>8}{'peak, MiB':>12}{'first loss':>12}{'last':>9}")
    whole = None
    for kind, runs in zip(kinds, zip(*turns)):
        median = statistics.median(second for run in runs for second in run["seconds"])
        whole = whole or median
        peak = max(run["peak_bytes"] for run in runs) / 2**20
        first, last = runs[0]["losses"][0], runs[0]["losses"][-1]
        print(f"{kind:10}{median:12.3f} s{median / whole:8.2f}{peak:12.0f}{first:12.4f}{last:9.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["both", "peer", "weights"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--tune", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "peer":
        peer(arguments.model, arguments.golden)
    elif arguments.mode == "weights":
        weights(arguments)
    else:
        both(arguments)


if __name__ == "__main__":
    main()
