#!/usr/bin/env python3
"""Writes tests/fixtures/bitsandbytes.safetensors: what bitsandbytes makes of weights in NF4 with double quantization, and where
five updates of its 8-bit AdamW lead. Needs torch, safetensors, bitsandbytes and an NVIDIA card: its kernels for the CPU give
other codes near zero.

usage: make_bitsandbytes.py OUT.safetensors
"""
import sys

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

tensors = {}
torch.manual_seed(7)

# Rows of a multiple of the 64 values of a block and not; more than one group of 256 scales, the last of them not whole.
for name, shape, dtype in [("f32", (70, 320), torch.float32), ("bf16", (33, 1000), torch.bfloat16)]:
    weight = (torch.randn(shape) ** 3 * 0.05).to(dtype).cuda()
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors |= {
        f"nf4.{name}.weight": weight,
        f"nf4.{name}.codes": codes.flatten(),
        f"nf4.{name}.scale_codes": state.absmax,
        f"nf4.{name}.group_scales": state.state2.absmax,
        f"nf4.{name}.offset": state.offset.reshape(1),
        f"nf4.{name}.values": functional.dequantize_4bit(codes, state).float(),
    }

# Whole blocks of 256 and not. Settings are those of tests/twin/bitsandbytes.rs.
for name, count in [("whole", 4096), ("ragged", 5000)]:
    parameter = torch.nn.Parameter((torch.randn(count) * 0.1).cuda())
    tensors[f"adamw8bit.{name}.start"] = parameter.detach().clone()
    optimizer = bitsandbytes.optim.AdamW8bit(
        [parameter], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, min_8bit_size=1
    )
    for step in range(5):
        gradient = (torch.randn(count) * 10.0 ** torch.randint(-4, 1, (count,))).cuda()
        parameter.grad = gradient
        optimizer.step()
        tensors[f"adamw8bit.{name}.gradient.{step}"] = gradient.clone()
        tensors[f"adamw8bit.{name}.parameter.{step}"] = parameter.detach().clone()
        state = optimizer.state[parameter]
        for moment, key in [("first", "1"), ("second", "2")]:
            tensors[f"adamw8bit.{name}.{moment}_codes.{step}"] = state["state" + key].clone()
            tensors[f"adamw8bit.{name}.{moment}_scales.{step}"] = state["absmax" + key].clone()
    tensors |= {"adamw8bit.first_map": state["qmap1"].clone(), "adamw8bit.second_map": state["qmap2"].clone()}

versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, sys.argv[1], metadata=versions)
print(sys.argv[1], versions)
