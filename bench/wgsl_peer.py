#!/usr/bin/env python3
"""The other side of `bench/wgsl.sh`, in PyTorch on the same card: python3 bench/wgsl_peer.py products | attention |
step MODEL BATCH SEQUENCE STEPS [none|all]. Products are torch.matmul, attention is scaled_dot_product_attention, a step is
Transformers' Llama with PEFT's LoRA in bf16, eager, random weights made on the card; `all` checkpoints every layer."""
import statistics, sys, time
import torch


def seconds(call, repeats=20):
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.3:
        call()
        torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / repeats)
    return best


def products():
    for dtype in (torch.bfloat16, torch.float16):
        for m, k, n in ((4096, 4096, 4096), (4096, 4096, 14336), (4096, 14336, 4096)):
            x, w, g = (torch.randn(s, device="cuda", dtype=dtype) for s in ((m, k), (n, k), (m, n)))
            rates = [2e-12 * m * n * k / seconds(call) for call in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x)]
            print(f"PyTorch {dtype} {m} x {k} x {n}: {rates[0]:.1f} {rates[1]:.1f} {rates[2]:.1f} TFLOP/s", flush=True)


def attention():
    batch, length, heads, dim = 2, 2048, 32, 128
    for dtype in (torch.bfloat16, torch.float16):
        for kv_heads in (32, 8):
            q, k, v = (torch.randn(batch, h, length, dim, device="cuda", dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))
            run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            out = run()
            grad = torch.randn_like(out)
            with torch.no_grad():
                ahead = seconds(run)
            back = seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
            flops = 2e-12 * batch * length * length * heads * dim
            print(f"PyTorch {dtype} attention {batch} x {length}, {heads} heads of {dim} ({kv_heads}): forward {flops / ahead:.1f} TFLOP/s, backward {2.5 * flops / back:.1f}", flush=True)


SHAPES = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, head_dim=64),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, head_dim=128),
}


def step(model_name, batch, length, steps, recompute="none"):
    import peft, transformers
    config = transformers.LlamaConfig(**SHAPES[model_name], max_position_embeddings=131072, rms_norm_eps=1e-5)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=targets, task_type="CAUSAL_LM"))
    if recompute == "all":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.randint(3, 300, (batch, length), device="cuda")
    positions = torch.arange(length, device="cuda").unsqueeze(0).expand(batch, -1)
    times = []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, position_ids=positions).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    median = statistics.median(times[3:])
    print(f"Hugging Face {model_name} lora {batch}x{length}, recompute {recompute}: {batch * length / median:.0f} tokens/s, {median * 1e3:.2f} ms a step, {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)


if __name__ == "__main__":
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "products":
        products()
    elif what == "attention":
        attention()
    else:
        step(rest[0], int(rest[1]), int(rest[2]), int(rest[3]), *rest[4:])
