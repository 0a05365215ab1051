"""How far PyTorch's own bf16 is from the golden fp32 run: SmolLM2's 20 LoRA steps, from adapters a thousandth apart.

usage: bf16_norms.py MODEL_FOLDER GOLDEN_FOLDER [RUNS]     (torch, transformers and peft; about 20 s a run on 2 cores)
Prints for each run the gradient norm and the loss that are furthest from the golden ones. The bound of
tests/golden_half on norms in bf16 rests on it.
"""
import json, pathlib, sys
import torch, peft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODEL, GOLDEN = sys.argv[1], pathlib.Path(sys.argv[2])
BATCHES, EXPECTED = load_file(GOLDEN / "batches.safetensors"), json.loads((GOLDEN / "lora.json").read_text())


def run(autocast, seed):
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = peft.PeftModel.from_pretrained(base, GOLDEN / "lora_init", is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = (p.data.float() * (1 + 1e-3 * torch.randn(p.shape, generator=generator))).to(
            torch.float32 if autocast else torch.bfloat16)
    # AdamW on f32 copies, as every engine here does.
    copies = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(copies, lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    norms, losses = [], []
    for step in range(20):
        inputs = {name: BATCHES[name][step] for name in ("input_ids", "attention_mask", "labels")}
        for p in parameters:
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        norm = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in parameters)).item()
        norms.append(norm / EXPECTED["grad_norms"][step] - 1)
        losses.append(loss.item() / EXPECTED["losses"][step] - 1)
        for p, copy in zip(parameters, copies):
            copy.grad = p.grad.float()
        optimizer.step()
        for p, copy in zip(parameters, copies):
            p.data.copy_(copy.data)
    step = max(range(20), key=lambda i: abs(norms[i]))
    how = "autocast, adapters in f32" if autocast else "all of it in bf16"
    print(f"{how}, start {seed}: norm {norms[step]:+.2%} at step {step}, loss {max(losses, key=abs):+.2%}", flush=True)


for seed in range(1, int(sys.argv[3] if len(sys.argv) > 3 else 8) + 1):
    run(False, seed)
    run(True, seed)
