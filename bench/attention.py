"""Checks and times the attention kernels on a GPU: python3 bench/attention.py [check] [time] [portable] [hopper]
(everything where nothing is named); python3 bench/attention.py compile needs no GPU.

Compiles kernels/ with NVRTC for the card present and compares outputs, log-sum-exp and gradients with a float64
reference on awkward shapes, twice (bits must repeat); then times forward and backward against PyTorch's SDPA.
Needs PyTorch with CUDA and libnvrtc; no toolkit. Launch shapes are those of src/backend/cuda/lower/attention.rs.
"""

import ctypes
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

KERNELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "kernels")


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0

    @property
    def columns(self):
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def scale(self):
        return self.head_dim**-0.5

    def defines(self):
        return {
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "SCALE": f"{self.scale!r}f",
            "WINDOW": self.window,
            "SOFTCAP": f"{self.softcap!r}f",
        }


# ---- compiling ----


def library(name, needed=True):
    for pattern in (name, *(f"{p}/nvidia/cu13/lib/{name}" for p in sys.path)):
        try:
            return ctypes.CDLL(pattern)
        except OSError:
            pass
    if needed:
        raise SystemExit(f"{name} not found")


def compile_cubin(files, defines, arch):
    """The cubin of the files one after the other, and the assembler's report."""
    library("libnvrtc-builtins.so.13.0", needed=False)
    nvrtc = library("libnvrtc.so.13")
    source = "\n".join(f'#line 1 "{f}"\n' + open(os.path.join(KERNELS, f)).read() for f in files)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), files[-1].encode(), 0, None, None)
    options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{k}={v}" for k, v in defines.items()]
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.value.decode()
    if failed:
        raise SystemExit(f"{files[-1]} does not compile with {defines}:\n{log}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw, log


BASE = ["prelude.cuh", "tensor_core.cuh", "attention_shape.cuh"]
HOPPER = ["prelude.cuh", "tensor_core.cuh", "hopper.cuh", "attention_shape.cuh", "attention_tiles.cuh"]


def ceil(a, b):
    return -(-a // b)


# ---- launch shapes ----


def forward_portable(shape):
    d = shape.head_dim
    warps, row_tiles, block_n = (4, 2, 64) if d <= 128 else (4, 1, 32)
    block_m = 16 * row_tiles * warps
    return dict(
        files=BASE + ["attention.cu"],
        defines={"WARPS": warps, "ROW_TILES": row_tiles, "BLOCK_N": block_n},
        kernels={
            "attention_forward": dict(
                grid=lambda t, sms: (ceil(t, block_m), shape.heads, 1),
                block=32 * warps,
                shared=(block_m + 2 * block_n) * (2 * d + 16),
            )
        },
    )


def backward_portable(shape):
    d = shape.head_dim
    warps, block, passes = (8, 64, 1) if d <= 128 else (4, 32, 2)
    lanes = 8 if d <= 64 else 16 if d <= 128 else 32
    row = 2 * d + 16
    return dict(
        files=BASE + ["attention.cu"],
        defines={"KEY_WARPS": warps, "KEY_BLOCK_M": block, "KEY_PASSES": passes, "QUERY_WARPS": warps, "QUERY_BLOCK_N": block},
        kernels={
            "attention_delta": dict(grid=lambda t, sms: (ceil(t * shape.heads, 256 // lanes), 1, 1), block=256, shared=0),
            "attention_backward_key_value": dict(
                grid=lambda t, sms: (ceil(t, 16 * warps), shape.kv_heads, passes),
                block=32 * warps,
                shared=(32 * warps + 4 * block) * row + 16 * block,
            ),
            "attention_backward_query": dict(
                grid=lambda t, sms: (ceil(t, 16 * warps), shape.heads, 1),
                block=32 * warps,
                shared=(32 * warps + 4 * block) * row,
            ),
        },
    )


def forward_hopper(shape):
    d = shape.head_dim
    return dict(
        files=HOPPER + ["attention_hopper.cu"],
        defines={"FORWARD": 1},
        kernels={
            "attention_forward_hopper": dict(
                grid=lambda t, sms: (min(sms, ceil(t, 128) * shape.heads), 1, 1),
                block=384,
                shared=1280 * d + 20480,
            )
        },
    )


def backward_hopper(shape):
    d = shape.head_dim
    return dict(
        files=HOPPER + ["attention_hopper.cu"],
        defines={"BACKWARD": 1},
        kernels={
            "attention_backward_key_value_hopper": dict(
                grid=lambda t, sms: (min(sms, ceil(t, 128) * shape.kv_heads), 1, 1), block=384, shared=1536 * d + 24576
            ),
            "attention_backward_query_hopper": dict(
                grid=lambda t, sms: (min(sms, ceil(t, 128) * shape.heads), 1, 1), block=384, shared=1536 * d + 20480
            ),
        },
    )


def section(shape, tokens):
    """Heads worked on together: keys and values of about 24 MB."""
    per_head = tokens * shape.head_dim * 4 * shape.kv_heads / shape.heads
    return max(1, min(shape.heads, int(24e6 / per_head)))


def key_section(shape, tokens):
    """Likewise, queries and their gradients."""
    per_head = tokens * shape.head_dim * 4 * shape.heads / shape.kv_heads
    return max(1, min(shape.kv_heads, int(24e6 / per_head)))


def compile_all():
    """Every kernel for every architecture; prints what spills or serializes. Needs no GPU."""
    for arch in ("80", "86", "89", "90a", "100", "120"):
        for d in (64, 80, 96, 128, 256):
            for shape in (Shape(8, 2, d), Shape(8, 8, d, window=100, softcap=30.0)):
                plans = [forward_portable(shape), backward_portable(shape)]
                if arch == "90a" and d in (64, 128):
                    plans += [forward_hopper(shape), backward_hopper(shape)]
                for plan in plans:
                    _, log = compile_cubin(plan["files"], {**shape.defines(), **plan["defines"]}, arch)
                    kernel = ""
                    for line in log.splitlines():
                        if "entry function" in line:
                            kernel = line.split("'")[1]
                        if "warning" in line or "Potential" in line or ("spill" in line and " 0 bytes spill stores" not in line):
                            print(arch, d, "softcap" if shape.softcap else "plain", kernel, line.strip())
    print("compiled")


def main():
    if sys.argv[1:] == ["compile"]:
        return compile_all()
    import torch

    cuda = ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    hopper = major == 9
    modules = {}
    reports = []

    def check(code, what):
        if code:
            raise RuntimeError(f"{what}: CUDA error {code}")

    loaded = {}

    def function(make, shape, name):
        key = (make, shape, name)
        if key not in loaded:
            plan, cubin = modules[(make, shape)]
            module, f = ctypes.c_void_p(), ctypes.c_void_p()
            check(cuda.cuModuleLoadData(ctypes.byref(module), cubin), f"loading {plan['files'][-1]}")
            check(cuda.cuModuleGetFunction(ctypes.byref(f), module, name.encode()), name)
            shared = plan["kernels"][name]["shared"]
            check(cuda.cuFuncSetAttribute(f, 8, shared), f"{name}: {shared} bytes of shared memory")
            loaded[key] = f
            # Kernels of one module share its counters.
            for other in plan["kernels"]:
                if other != name:
                    g = ctypes.c_void_p()
                    check(cuda.cuModuleGetFunction(ctypes.byref(g), module, other.encode()), other)
                    check(cuda.cuFuncSetAttribute(g, 8, plan["kernels"][other]["shared"]), other)
                    loaded[(make, shape, other)] = g
        return loaded[key]

    def launch(make, shape, name, tokens, *arguments):
        f = function(make, shape, name)
        kernel = modules[(make, shape)][0]["kernels"][name]
        values = []
        for a in arguments:
            if isinstance(a, torch.Tensor):
                values.append(ctypes.c_void_p(a.data_ptr()))
            elif isinstance(a, int):
                values.append(ctypes.c_int(a))
            else:
                values.append(a)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        check(
            cuda.cuLaunchKernel(f, *kernel["grid"](tokens, sms), kernel["block"], 1, 1, kernel["shared"], stream, pointers, None),
            name,
        )

    # What a LoRA branch's middle is made of: none here.
    no_branch = (ctypes.c_void_p(), ctypes.c_int64(), ctypes.c_void_p())

    def tensor_map(tensor, rows):
        """A map of a bf16 matrix in boxes of 64 columns with the 128-byte swizzle."""
        raw = ctypes.create_string_buffer(128 + 64)
        aligned = (ctypes.addressof(raw) + 63) // 64 * 64
        t, columns = tensor.shape
        check(
            cuda.cuTensorMapEncodeTiled(
                ctypes.c_void_p(aligned),
                9,  # bfloat16
                2,
                ctypes.c_void_p(tensor.data_ptr()),
                (ctypes.c_uint64 * 2)(columns, t),
                (ctypes.c_uint64 * 1)(columns * 2),
                (ctypes.c_uint32 * 2)(64, rows),
                (ctypes.c_uint32 * 2)(1, 1),
                0,
                3,  # 128-byte swizzle
                2,  # L2 promotion of 128 bytes
                0,
            ),
            "cuTensorMapEncodeTiled",
        )
        return (ctypes.c_char * 128).from_buffer_copy(ctypes.string_at(aligned, 128))

    class Problem:
        def __init__(self, shape, lengths, seed=0, spread=1.0):
            generator = torch.Generator("cuda").manual_seed(seed)
            t = sum(lengths)
            self.shape, self.lengths, self.tokens = shape, lengths, t
            self.qkv = (torch.randn(t, shape.columns, device="cuda", generator=generator) * spread).bfloat16()
            self.grad_output = torch.randn(t, shape.heads * shape.head_dim, device="cuda", generator=generator).bfloat16()
            starts, ends, at = [], [], 0
            for n in lengths:
                starts += [at] * n
                ends += [at + n] * n
                at += n
            self.start = torch.tensor(starts, dtype=torch.int32, device="cuda")
            self.end = torch.tensor(ends, dtype=torch.int32, device="cuda")
            nan = float("nan")
            self.output = torch.full((t, shape.heads * shape.head_dim), nan, device="cuda", dtype=torch.bfloat16)
            self.lse = torch.full((t, shape.heads), nan, device="cuda")
            self.delta = torch.full((t, shape.heads), nan, device="cuda")
            self.grad_qkv = torch.full((t, shape.columns), nan, device="cuda", dtype=torch.bfloat16)
            self.maps = (tensor_map(self.qkv, 128), tensor_map(self.qkv, 64), tensor_map(self.grad_output, 128), tensor_map(self.grad_output, 64)) if hopper else ()

        def poison(self):
            for x in (self.output, self.lse, self.delta, self.grad_qkv):
                x.fill_(float("nan"))

        def forward(self, make):
            s, t = self.shape, self.tokens
            if make is forward_hopper:
                launch(make, s, "attention_forward_hopper", t, self.output, self.lse, self.maps[0], self.start, t, section(s, t), *no_branch)
            else:
                launch(make, s, "attention_forward", t, self.output, self.lse, self.qkv, self.start, t, *no_branch)

        def delta_kernel(self):
            launch(backward_portable, self.shape, "attention_delta", self.tokens, self.delta, self.grad_output, self.output, self.tokens)

        def backward_keys(self, make):
            s, t = self.shape, self.tokens
            if make is backward_hopper:
                launch(make, s, "attention_backward_key_value_hopper", t, self.grad_qkv, self.maps[0], self.maps[1], self.maps[3], self.lse, self.delta, self.end, t, key_section(s, t))
            else:
                launch(make, s, "attention_backward_key_value", t, self.grad_qkv, self.grad_output, self.qkv, self.lse, self.delta, self.end, t)

        def backward_queries(self, make):
            s, t = self.shape, self.tokens
            if make is backward_hopper:
                launch(make, s, "attention_backward_query_hopper", t, self.grad_qkv, self.maps[0], self.maps[2], self.lse, self.delta, self.start, t, section(s, t))
            else:
                launch(make, s, "attention_backward_query", t, self.grad_qkv, self.grad_output, self.qkv, self.lse, self.delta, self.start, t)

        def backward(self, make):
            self.delta_kernel()
            self.backward_keys(make)
            self.backward_queries(make)

        def reference(self):
            s, t = self.shape, self.tokens
            qkv = self.qkv.double().requires_grad_()
            q, k, v = qkv.split([s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim], 1)
            group = s.heads // s.kv_heads
            q = q.view(t, s.heads, -1).transpose(0, 1)
            k = k.view(t, s.kv_heads, -1).transpose(0, 1).repeat_interleave(group, 0)
            v = v.view(t, s.kv_heads, -1).transpose(0, 1).repeat_interleave(group, 0)
            scores = q @ k.transpose(1, 2) * s.scale
            if s.softcap:
                scores = s.softcap * torch.tanh(scores / s.softcap)
            i = torch.arange(t, device="cuda")
            seen = (i[None] <= i[:, None]) & (i[None] >= self.start[:, None])
            if s.window:
                seen &= i[None] > i[:, None] - s.window
            scores = scores.masked_fill(~seen, float("-inf"))
            lse = scores.logsumexp(-1).T
            output = (scores.softmax(-1) @ v).transpose(0, 1).reshape(t, -1)
            (gradient,) = torch.autograd.grad(output, qkv, self.grad_output.double())
            return output.detach(), lse.detach(), gradient

    def error(ours, reference):
        difference = (ours.double() - reference).norm() / reference.norm().clamp_min(1e-30)
        return difference.item()

    def engines(shape):
        if "portable" in wanted:
            yield "portable", forward_portable, backward_portable
        if "hopper" in wanted and hopper and shape.head_dim in (64, 128):
            yield "hopper", forward_hopper, backward_hopper

    what = [a for a in sys.argv[1:] if a in ("check", "time")] or ["check", "time"]
    wanted = [a for a in sys.argv[1:] if a in ("portable", "hopper")] or ["portable", "hopper"]
    shapes = []
    if "check" in what:
        for d in (64, 80, 96, 128, 256):
            shapes += [Shape(4, 4, d), Shape(8, 2, d), Shape(6, 2, d, window=100, softcap=30.0), Shape(3, 1, d, window=1)]
    timed = [
        ("2 x 2048, 32 heads of 128", Shape(32, 32, 128), [2048] * 2),
        ("2 x 2048, 32/8 heads of 128", Shape(32, 8, 128), [2048] * 2),
        ("1 x 32768, 32/8 heads of 128", Shape(32, 8, 128), [32768]),
        ("1 x 32768, 32 heads of 128", Shape(32, 32, 128), [32768]),
        ("8 x 179, 32/8 heads of 128", Shape(32, 8, 128), [179] * 8),
        ("2 x 2048, 32/8 heads of 64", Shape(32, 8, 64), [2048] * 2),
    ]
    checked = list(shapes)
    if "time" in what:
        shapes += list(dict.fromkeys(s for _, s, _ in timed))
    items = []
    for shape in shapes:
        for _, f, b in engines(shape):
            items += [(f, shape), (b, shape), (backward_portable, shape)]
    items = list(dict.fromkeys(items))
    plans = [make(shape) for make, shape in items]
    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(
            compile_cubin,
            [plan["files"] for plan in plans],
            [{**shape.defines(), **plan["defines"]} for plan, (_, shape) in zip(plans, items)],
            [arch] * len(items),
        )
        for item, plan, (cubin, log) in zip(items, plans, compiled):
            modules[item] = (plan, cubin)
            reports.append(f"== {plan['files'][-1]} {item[1]}\n{log}")
    out = os.environ.get("OUT")
    if out:
        open(os.path.join(out, "assembler.txt"), "w").write("\n".join(reports))
    print(f"{torch.cuda.get_device_name()}, sm_{arch}, {sms} multiprocessors, {len(modules)} modules compiled", flush=True)

    failures = 0
    if "check" in what:
        cases = [[1], [37], [179] * 8, [5, 1, 300, 64, 128, 129, 1, 1, 17], [1000], [128, 128], [127, 2, 127]]
        passed = 0
        worst = {}
        for shape in checked:
            for lengths in cases:
                p = Problem(shape, lengths, seed=len(lengths))
                output, lse, gradient = p.reference()
                s = shape
                q_end, k_end = s.heads * s.head_dim, (s.heads + s.kv_heads) * s.head_dim
                for name, f, b in engines(shape):
                    if out:
                        open(os.path.join(out, "progress.txt"), "a").write(f"{name} {shape} {lengths}\n")
                    runs = []
                    for _ in range(2):
                        p.poison()
                        p.forward(f)
                        p.backward(b)
                        torch.cuda.synchronize()
                        runs.append([x.clone() for x in (p.output, p.lse, p.grad_qkv)])
                    same = all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(*runs))
                    errors = dict(
                        output=error(p.output, output),
                        lse=(p.lse.double() - lse).abs().max().item(),
                        dq=error(p.grad_qkv[:, :q_end], gradient[:, :q_end]),
                        dk=error(p.grad_qkv[:, q_end:k_end], gradient[:, q_end:k_end]),
                        dv=error(p.grad_qkv[:, k_end:], gradient[:, k_end:]),
                    )
                    # One visible key makes dq and dk zero in exact arithmetic: compare those absolutely.
                    if s.window == 1 or max(lengths) == 1:
                        errors["dq"] = p.grad_qkv[:, :q_end].double().abs().max().item() / 10
                        errors["dk"] = p.grad_qkv[:, q_end:k_end].double().abs().max().item() / 10
                    good = all(v < (1e-3 if k == "lse" else 1e-2) for k, v in errors.items()) and same
                    for k, v in errors.items():
                        worst[(name, k)] = max(worst.get((name, k), 0.0), v) if v == v else float("nan")
                    if good:
                        passed += 1
                    else:
                        failures += 1
                        if failures <= 40:
                            print("FAILED", name, shape, lengths, "repeats" if same else "DIFFERS BETWEEN RUNS", {k: f"{v:.2g}" for k, v in errors.items()}, flush=True)
        print("worst errors:", {f"{n} {k}": f"{v:.2g}" for (n, k), v in worst.items()})
        print(f"{passed} passed, {failures} failed", flush=True)

    if "time" in what:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        import torch.nn.functional as F

        def median(call, repeats, batch=8):
            """Seconds a call: batches queued behind a sleep, so that the host's launches are not what is timed."""
            for _ in range(3):
                call()
            times = []
            for _ in range(max(3, repeats // batch)):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(4_000_000)
                a.record()
                for _ in range(batch):
                    call()
                b.record()
                torch.cuda.synchronize()
                times.append(a.elapsed_time(b) * 1e-3 / batch)
            return statistics.median(times)

        rows = []

        def row(label, engine, forward, backward, flops, parts=""):
            f = f"{forward * 1e6:8.0f} us {flops / forward * 1e-12:6.0f}" if forward else " " * 18
            b = f"{backward * 1e6:8.0f} us {2.5 * flops / backward * 1e-12:6.0f}" if backward else " " * 18
            rows.append(dict(case=label, engine=engine, forward_s=forward, backward_s=backward, flops=flops))
            print(f"{label:30} {engine:15} {f}   {b}   {parts}", flush=True)

        print(f"{'case':30} {'engine':15} {'forward TFLOP/s':>18}   {'backward TFLOP/s':>18}   delta, keys, queries (us)")
        for label, shape, lengths in timed:
            flops = 4 * shape.head_dim * shape.heads * sum(n * (n + 1) / 2 for n in lengths)
            p = Problem(shape, lengths)
            repeats = 24 if sum(lengths) > 10000 else 80
            results = {}
            for name, f, b in engines(shape):
                try:
                    p.poison()
                    forward = median(lambda: p.forward(f), repeats)
                    parts = [median(c, repeats) for c in (p.delta_kernel, lambda: p.backward_keys(b), lambda: p.backward_queries(b))]
                    backward = median(lambda: p.backward(b), repeats)
                    results[name] = (p.output.clone(), p.grad_qkv.clone())
                    row(label, name, forward, backward, flops, ", ".join(f"{x * 1e6:.0f}" for x in parts))
                except RuntimeError as e:
                    print(label, name, e)
            batch, n, g = len(lengths), lengths[0], shape.heads // shape.kv_heads
            q, k, v = p.qkv.split([shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim], 1)
            q = q.view(batch, n, shape.heads, -1).transpose(1, 2).contiguous().requires_grad_()
            k = k.view(batch, n, shape.kv_heads, -1).transpose(1, 2).repeat_interleave(g, 1).contiguous().requires_grad_()
            v = v.view(batch, n, shape.kv_heads, -1).transpose(1, 2).repeat_interleave(g, 1).contiguous().requires_grad_()
            grad = p.grad_output.view(batch, n, shape.heads, -1).transpose(1, 2).contiguous()
            for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
                try:
                    with sdpa_kernel(backend):
                        forward = median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), repeats)
                        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                        backward = median(lambda: torch.autograd.grad(o, (q, k, v), grad, retain_graph=True), repeats)
                        gq = torch.autograd.grad(o, (q, k, v), grad, retain_graph=True)[0]
                    row(label, name, forward, backward, flops)
                    if name == "SDPA flash":
                        o = o.detach().transpose(1, 2).reshape(p.tokens, -1).double()
                        gq = gq.transpose(1, 2).reshape(p.tokens, -1).double()
                        for engine, (ours, ours_grad) in results.items():
                            print(" " * 30, f"{engine} against {name}: output {error(ours, o):.2g}, dq {error(ours_grad[:, :gq.shape[1]], gq):.2g}")
                except RuntimeError as e:
                    print(label, name, str(e).split("\n")[0])
            del q, k, v, grad, p
            torch.cuda.empty_cache()
        if out:
            json.dump(rows, open(os.path.join(out, "attention.json"), "w"), indent=1)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
