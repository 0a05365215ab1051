#!/usr/bin/env python3
"""How far PyTorch itself is from its fp32 golden runs when SmolLM2 computes in bf16 (autocast, adapters and their
optimizer in fp32): the losses of make_golden.py's runs, taken again in bf16 on the CPU.

    python3 make_golden_bf16.py SMOLLM2_FOLDER GOLDEN_FOLDER OUT.json

Needs what make_venv.sh installs. Five minutes on two cores.
"""
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

smollm2, golden, out = map(Path, sys.argv[1:4])
batches = load_file(golden / "batches.safetensors")


def loss_of(model, index):
    rows = {key: values.flatten(0, -2)[2 * index : 2 * index + 2] for key, values in batches.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**rows).loss


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, attn_implementation="sdpa")


def adapted(folder):
    model = PeftModel.from_pretrained(base(), golden / folder, is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return model, parameters


def mean_loss(model):
    """Over all batches, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, index).item() for index in range(20)]
    model.train()
    return sum(losses) / len(losses)


def lora():
    model, parameters = adapted("lora_init")
    before = mean_loss(model)
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    losses, norms = [], []
    for step in range(20):
        loss = loss_of(model, step)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1e9)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, norms, before, mean_loss(model)


def schedule():
    model, parameters = adapted("lora_final")
    before = mean_loss(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rate = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 10)
    labels = batches["labels"].flatten(0, -2)
    targets = lambda index: (labels[2 * index : 2 * index + 2, 1:] != -100).sum().item()
    losses, norms = [], []
    for update in range(10):
        pair = (2 * update, 2 * update + 1)
        total = 0.0
        for index in pair:
            part = loss_of(model, index) * (targets(index) / sum(map(targets, pair)))
            part.backward()
            total += part.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.5)))
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, norms, before, mean_loss(model)


result = {"torch": torch.__version__, "transformers": transformers.__version__}
for name, run, norm_key in [("lora", lora, "grad_norms"), ("schedule", schedule, "grad_norms_before_clipping")]:
    reference = json.loads((golden / f"{name}.json").read_text())
    losses, norms, before, after = run()
    golden_after = reference["losses_after_training_same_batches"]
    fall, golden_fall = before - after, before - sum(golden_after) / len(golden_after)
    worst = max(abs(a / b - 1) for a, b in zip(losses, reference["losses"]))
    worst_norm = max(abs(a / b - 1) for a, b in zip(norms, reference[norm_key]))
    print(f"{name}: losses within {worst:.1e} of fp32, norms within {worst_norm:.1e}; the mean loss falls by {fall:.4f}, fp32 {golden_fall:.4f}", flush=True)
    result[name] = {"losses": losses, "grad_norms": norms, "furthest_loss": worst, "furthest_norm": worst_norm, "furthest_fall": abs(fall / golden_fall - 1)}
out.write_text(json.dumps(result, indent=1) + "\n")
