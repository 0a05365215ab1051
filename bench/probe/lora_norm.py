"""Norms that sum for LoRA branches themselves, beside norms with the products of the library: python3 bench/probe/lora_norm.py
Needs a card, torch and the NVRTC that comes with it. Kernels: norm_middle.cu (forward), norm_backward.cu (by tiles, the means
of rows given); they are in no program. Times are medians in microseconds, the L2 cache swept before each."""
import ctypes
import glob
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"
RANK = 16


def nvrtc():
    packages = [path for path in sys.path if path.endswith("packages")]
    found = [f for path in packages for f in glob.glob(path + "/nvidia/**/libnvrtc.so*", recursive=True)]
    for name in [f for f in found if "builtins" not in f] + ["libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    sys.exit("NVRTC was not found")


compiler, driver = nvrtc(), ctypes.CDLL("libcuda.so.1")


class Module:
    """Kernels of these files below each other, compiled for this card."""

    def __init__(self, files, **macros):
        text = "\n".join(file.read_text() for file in files).encode()
        major, minor = torch.cuda.get_device_capability()
        options = [f"--gpu-architecture=sm_{major}{minor}" + ("a" if major == 9 else ""), "--std=c++17"]
        options = [option.encode() for option in options + [f"-D{name}={value}" for name, value in macros.items()]]
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        compiler.nvrtcCreateProgram(ctypes.byref(program), text, b"probe.cu", 0, None, None)
        if compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            sys.exit(log.value.decode())
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, binary)
        self.module = ctypes.c_void_p()
        assert driver.cuModuleLoadData(ctypes.byref(self.module), binary) == 0

    def launch(self, entry, grid, threads, shared, *arguments):
        """A function that launches the kernel: tensors by address, the rest as ctypes."""
        function = ctypes.c_void_p()
        assert driver.cuModuleGetFunction(ctypes.byref(function), self.module, entry.encode()) == 0, entry
        if shared > 48 << 10:
            assert driver.cuFuncSetAttribute(function, 8, shared) == 0
        held = [ctypes.c_uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in held])

        def run(kept=(held, arguments)):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            assert driver.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, pointers, None) == 0

        return run


def microseconds(run):
    for _ in range(3):
        run()
    times = []
    for _ in range(12):
        swept.add_(1.0)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def off(found, expected):
    return f"{((found.double() - expected.double()).norm() / expected.double().norm()).item():.1e}"


def case(tokens, columns, readers):
    """`readers`: ranks of the branches that read the norm, together."""
    print(f"{tokens} x {columns}, branches of rank {readers} that read the norm")
    integer, long, real = ctypes.c_int, ctypes.c_longlong, ctypes.c_float
    random = lambda *shape, by=1.0: (torch.randn(*shape, device="cuda") * by).bfloat16()
    room = lambda *shape, dtype=torch.bfloat16: torch.zeros(*shape, device="cuda", dtype=dtype)
    f32 = torch.float32
    stride = columns + 64
    prelude, tensor_core = KERNELS / "prelude.cuh", KERNELS / "tensor_core.cuh"
    norms = Module([prelude, KERNELS / "rms_norm.cu"])

    given, residual, a = random(tokens, columns), random(tokens, columns), random(readers, columns, by=0.02)
    weight = (1 + 0.1 * torch.randn(columns, device="cuda")).bfloat16()
    total, output, inverse = torch.empty_like(given), room(tokens, stride), room(tokens, dtype=f32)
    middle = room(tokens, readers)
    normed = output[:, :columns]
    forward = [given, residual, total, weight, output, long(stride), inverse]
    plain = norms.launch("rms_norm_8_bf16", (tokens, 1, 1), 256, 0, *forward, integer(columns), real(1e-5), real(0))
    joined = Module([prelude, tensor_core, HERE / "norm_middle.cu"], COLUMNS=columns, RANKS=readers)
    shared = max(16 * (2 * columns + 64), 16 * 16 * readers * 4)
    joined = joined.launch("norm_middle", (-(-tokens // 16), 1, 1), 512, shared, *forward, a, middle, integer(tokens), real(1e-5))
    joined()
    torch.cuda.synchronize()
    wrong = off(middle, normed.float() @ a.float().T)
    apart = lambda: (plain(), torch.mm(normed, a.T, out=middle))
    print(f"  forward (off by {wrong}): norm {microseconds(plain):.1f}, with the product {microseconds(apart):.1f}, "
          f"joined {microseconds(joined):.1f}")

    grad, past, g = random(tokens, columns), random(tokens, columns), random(tokens, readers)
    b, kept = random(columns, RANK, by=0.1), random(tokens, RANK)
    means, grad_input = room(tokens, dtype=f32), room(tokens, stride)
    grad_middle, grad_b, grad_a = room(tokens, RANK), room(columns, RANK, dtype=f32), room(readers, columns, dtype=f32)
    partial = [room(64 << 20, dtype=torch.uint8) for _ in range(3)]
    tiled = Module([prelude, tensor_core, KERNELS / "lora.cuh", HERE / "norm_backward.cu"], RANK=RANK, READERS=readers)
    mean = tiled.launch("norm_means", (tokens, 1, 1), 256, 0, grad, total, weight, inverse, means, integer(columns))
    alone = norms.launch("rms_norm_backward_8_bf16", (tokens, 1, 1), 256, 0, grad, total, weight, inverse, past, long(columns),
                         grad_input, long(stride), integer(columns), real(0))
    mean(), alone()
    torch.cuda.synchronize()
    result = grad_input[:, :columns]
    expected = result.clone()
    sums = [expected.float() @ b.float(), expected.float().T @ kept.float(), g.float().T @ normed.float()]

    def apart():
        alone()
        torch.mm(result, b, out=grad_middle)
        torch.mm(result.T, kept)
        torch.mm(g.T, normed)

    print(f"  backward: norm {microseconds(alone):.1f}, with three products {microseconds(apart):.1f}, means {microseconds(mean):.1f}")
    for tiles in (1, 2, 4):
        blocks, column_tiles = -(-tokens // (128 * tiles)), -(-columns // 128)
        strip = -(-column_tiles // min(max(1, 132 // blocks), column_tiles))
        strips = -(-column_tiles // strip)
        thin = 128 * (2 * RANK + 16) * (1 + tiles) + 128 * tiles * (2 * readers + 16) + 128 * tiles * 8
        kernel = tiled.launch(f"norm_backward_{tiles}", (strips, blocks, 1), 512, 2 * 32768 + thin, grad, total, past, long(columns),
                              weight, inverse, means, grad_input, long(stride), b, kept, g, *partial, integer(tokens),
                              integer(columns), integer(strip))
        finish = tiled.launch("norm_finish", (264, 1, 1), 256, 0, partial[0], integer(strips), partial[1], partial[2],
                              integer(blocks), grad_middle, grad_b, grad_a, integer(tokens), integer(columns))
        for tensor in (grad_input, grad_b, grad_a):
            tensor.zero_()
        kernel(), finish()
        torch.cuda.synchronize()
        wrong = ", ".join(off(*pair) for pair in zip([result, grad_middle, grad_b, grad_a], [expected, *sums]))
        print(f"    {tiles} tiles of tokens a block (off by {wrong}): {microseconds(kernel):.1f}, with its sums "
              f"{microseconds(lambda: (kernel(), finish())):.1f}, with the means {microseconds(lambda: (mean(), kernel(), finish())):.1f}")


if __name__ == "__main__":
    torch.manual_seed(1)
    swept = torch.zeros(64 << 20, device="cuda")
    for shape in [(4096, 4096, 48), (4096, 4096, 32), (8192, 2048, 48), (8192, 2048, 32)]:
        case(*shape)
