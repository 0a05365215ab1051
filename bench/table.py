"""Tables of bench/gpu.sh.

usage: table.py RESULTS                        the rows of ours, each beside the rival's and the design's target
       table.py curve BF16 FP8                 loss curves of two runs' events
       table.py process BEGUN KIND EVENTS      a whole process: its seconds and those to its first step, as a result
"""
import datetime
import json
import sys

# Tokens (of `rows`: rows) a second, and GiB, that a row is to reach: (model, method, batch, sequence, everything kept).
TARGETS = {
    ("8b", "lora", 2, 2048, False): (12_500, 16.5),
    ("8b", "lora", 2, 2048, True): (16_500, None),
    ("8b", "fp8", 2, 2048, True): (21_000, None),
    ("8b", "qlora", 2, 2048, False): (11_800, 6.8),
    ("8b", "qlora", 8, 2048, False): (12_300, 9.9),
    ("8b", "qlora", 1, 32768, False): (6_700, 14.0),
    ("1b", "lora", 4, 2048, False): (58_000, 3.6),
    ("1b", "lora", 4, 2048, True): (72_000, None),
    ("1b", "full", 4, 2048, False): (48_000, 7.7),
    ("1b", "full", 4, 2048, True): (57_000, None),
    ("135m", "lora", 8, 512, False): (220_000, 0.6),
    ("135m", "lora", 8, 512, True): (280_000, None),
    ("135m", "full", 8, 512, True): (250_000, None),
    ("8b", "qlora", 8, "rows", False): (45, 6.1),
    ("8b", "qlora", 91, "rows", False): (60, None),
    ("135m", "lora", 8, "rows", False): (400, None),
}
PROCESS_SECONDS, FIRST_STEP_SECONDS = 10, 6


def curve(plain_path, fp8_path):
    def read(path):
        events = [json.loads(line) for line in open(path)]
        steps = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
        return [steps[step] for step in sorted(steps)], [e["loss"] for e in events if e["event"] == "eval"]

    (plain, held), (fp8, held_fp8) = read(plain_path), read(fp8_path)
    print(f"{'updates':>9} {'bf16':>8} {'fp8':>8} {'difference':>11}")
    for first in range(0, len(plain), 10):
        a, b = (sum(c[first:first + 10]) / len(c[first:first + 10]) for c in (plain, fp8))
        print(f"{first + 1:4}-{min(first + 10, len(plain)):<4} {a:8.4f} {b:8.4f} {b / a - 1:+11.2%}")
    apart = [abs(b / a - 1) for a, b in zip(plain, fp8)]
    print(f"updates apart by {sum(apart) / len(apart):.2%} on average, {max(apart):.2%} at most; {len(plain)} of them")
    print("held-out loss:", ", ".join(f"{a:.4f} and {b:.4f}" for a, b in zip(held, held_fp8)))


def process(begun, kind, path):
    now = datetime.datetime.now(datetime.timezone.utc).timestamp()
    events = [json.loads(line) for line in open(path) if line.startswith("{")]

    def after(kind):
        time = next(e["time"] for e in events if e["event"] == kind)
        return round(datetime.datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() - begun, 2)

    figures = {"peer": "tune", "cache": kind, "seconds": round(now - begun, 1), "started_s": after("started"),
               "planned_s": after("plan"), "first_step_s": after("step")}
    print("PROCESS " + json.dumps(figures), flush=True)


def figure(kind, speed):
    return f"{speed:,.0f} tok/s" if kind == "RESULT" else f"{speed:.1f} rows/s"


def table(path):
    ours, others, processes, apart = [], {}, [], []
    for line in open(path):
        kind, _, text = line.partition(" ")
        if kind == "PROCESS":
            processes.append(json.loads(text))
        if kind not in ("RESULT", "ROWS"):
            continue
        r = json.loads(text)
        speed = r["tok_s"] if kind == "RESULT" else r["rows_s"]
        batch = r.get("batch", 91 if r.get("packing") else 8)
        key = (r["model"], r["method"], batch, r.get("seq", "rows"))
        peer = r.get("peer", "unsloth")
        if peer == "tune":
            ours.append((key, kind, r, speed))
        else:
            others[key, peer] = (speed, r.get("alloc_gib", r.get("peak_gib", 0)))
    print(f"{'case':30} {'ours':>15} {'GiB':>6} {'planned':>8} {'of floor':>9} {'target':>8} {'GiB':>5} {'met':>4} "
          f"{'Unsloth':>9} {'GiB':>6} {'ratio':>6} {'HF':>7} {'GiB':>6}")
    seen = set()
    for key, kind, r, speed in ours:
        kept = kind == "RESULT" and r.get("recompute") in ("none", "free")
        target, memory = TARGETS.get((*key, kept), (None, None))
        rival = others.get((key, "unsloth-nogc")) if kept else None
        rival = rival or others.get((key, "unsloth"))
        hf = others.get((key, "hf"))
        seen.update({(key, "unsloth-nogc"), (key, "unsloth"), (key, "hf")})
        met = "" if target is None else "yes" if speed >= target and (memory is None or r["used_gib"] <= memory) else "no"
        case = f"{key[0]} {key[1]} {key[2]}x{key[3]} {r.get('recompute', '')}"
        print(f"{case:30} {figure(kind, speed):>15} {r['used_gib']:6.2f} {r.get('planned_gib', 0):8.2f} "
              f"{r.get('share_of_floor', ''):>9} {target or '':>8} {memory or '':>5} {met:>4} "
              + (f"{rival[0]:9,.1f} {rival[1]:6.2f} {speed / rival[0]:6.2f} " if rival else " " * 24)
              + (f"{hf[0]:7,.0f} {hf[1]:6.2f}" if hf else ""))
        if "planned_gib" in r:
            off = abs(r["used_gib"] - r["planned_gib"])
            apart.append((off / max(0.02 * r["used_gib"], 150 / 1024), off, case))
    for (key, peer), (speed, gib) in others.items():
        if (key, peer) not in seen:
            print(f"{' '.join(map(str, key)):30} {peer}: {speed:,.1f}, {gib:.2f} GiB")
    for p in processes:
        goals = f" (targets {PROCESS_SECONDS} and {FIRST_STEP_SECONDS})" if p["peer"] == "tune" else ""
        first = ""
        if "first_step_s" in p:
            first = f", planned after {p['planned_s']} s, first step after {p['first_step_s']} s"
        cache = f" with a {p['cache']} cache of kernels" if "cache" in p else ""
        print(f"a process with 11 steps of 8B LoRA 2x2048, {p['peer']}{cache}: {p['seconds']} s{first}{goals}")
    if apart:
        worst = max(apart)
        print(f"plan and card within max(2%, 150 MiB): {sum(a[0] <= 1 for a in apart)} of {len(apart)} rows; "
              f"furthest apart, by {worst[1] * 1024:.0f} MiB: {worst[2]}")


match sys.argv[1:]:
    case ["curve", plain, fp8]:
        curve(plain, fp8)
    case ["process", begun, kind, events]:
        process(float(begun), kind, events)
    case [results]:
        table(results)
    case _:
        sys.exit(__doc__)
