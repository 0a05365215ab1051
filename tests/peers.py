"""Adapters and models made here, loaded in PEFT and Transformers, and the other way round: the same logits.

Run by tests/peers.sh. Needs torch, transformers, peft, and the `tune` and `logits` binaries in target/release.
"""
import json, os, subprocess, sys, tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"
TOLERANCE = 2e-4
torch.set_num_threads(2)
passed, failed = 0, 0


def ours(model, adapter, ids):
    command = [BIN / "examples/logits", model, adapter or "-", *map(str, ids)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return torch.tensor(json.loads(out))


def theirs(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].float()


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def check(name, a, b):
    global passed, failed
    error = float((a - b).abs().max() / b.abs().max())
    good = error <= TOLERANCE
    passed, failed = passed + good, failed + (not good)
    print(f"{'ok  ' if good else 'FAIL'} {name}: max|difference| / max|reference| = {error:.1e}", flush=True)


def train(model, home, vocabulary, *settings):
    """A few steps on rows of token ids; returns the run's folder."""
    data = home / "rows.jsonl"
    generator = torch.Generator().manual_seed(1)
    with data.open("w") as file:
        for _ in range(16):
            ids = torch.randint(3, vocabulary, (20,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * 5 + ids[5:]}) + "\n")
    command = [BIN / "tune", "train", "--model", model, "--data", data, "--json"]
    common = ["data.format=tokens", "data.eval=0", "data.max_length=64", "train.steps=4", "train.batch=4",
              "train.warmup=0", "engine.device=cpu"]
    for setting in [*common, *settings]:
        command += ["--set", setting]
    environment = {**os.environ, "TUNE_HOME": str(home / "home")}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    if out.returncode != 0:
        sys.exit(f"tune train failed with {out.returncode}: {out.stdout[-2000:]}{out.stderr[-2000:]}")
    last = json.loads(out.stdout.strip().splitlines()[-1])
    assert last["event"] == "finished", last
    return Path(last["path"])


def main():
    models = [(name, ROOT / "tests/fixtures/tiny" / name, 512) for name in ("llama", "qwen2")]
    smollm2 = ROOT / "models/smollm2-135m"
    if smollm2.exists():
        models.append(("smollm2", smollm2, 49152))
    else:
        print("left out: SmolLM2 is not there (tests/run.sh fetches it)")
    for name, folder, vocabulary in models:
        ids = torch.randint(3, vocabulary, (17,), generator=torch.Generator().manual_seed(2)).tolist()
        with tempfile.TemporaryDirectory() as temporary:
            home = Path(temporary)
            check(f"{name}: base model", ours(folder, None, ids), theirs(base(folder), ids))
            result = train(folder, home, vocabulary, "train.learning_rate=5e-3", "method.rank=4")
            assert result.name == "adapter", result
            model = PeftModel.from_pretrained(base(folder), result)
            check(f"{name}: adapter trained here, in PEFT", ours(folder, result, ids), theirs(model, ids))

            torch.manual_seed(3)
            targets = ["q_proj", "v_proj", "down_proj"]
            model = get_peft_model(base(folder), LoraConfig(r=8, lora_alpha=12, target_modules=targets, use_rslora=True,
                                                            init_lora_weights=False, task_type="CAUSAL_LM"))
            model.save_pretrained(home / "peft")
            check(f"{name}: PEFT's adapter, here", ours(folder, home / "peft", ids), theirs(model, ids))

            if name != "smollm2":
                result = train(folder, home, vocabulary, "method.kind=full", "train.learning_rate=1e-3")
                assert result.name == "model", result
                check(f"{name}: model trained here, in Transformers", ours(result, None, ids), theirs(base(result), ids))
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


main()
