#!/usr/bin/env python3
"""Experiments with cooperative matrices on a card, without a build: writes WGSL and jobs for the example `wgsl_probe`,
runs it and judges what comes back. python3 bench/wgsl_probe.py RUNNER attention|products|pytorch ...; needs numpy."""
import itertools, json, os, re, subprocess, sys, tempfile, time
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def expand(lines, constants, loops=()):
    """The directives of src/backend/wgpu/template.rs."""
    out, at = [], 0
    while at < len(lines):
        line = lines[at]
        words = line.strip()[1:].split() if line.strip().startswith("#") else None
        if words is None:
            for variable, value in loops:
                line = line.replace(variable, str(value))
            out.append(line)
            at += 1
        elif words[0] == "include":
            out += expand(shader(words[1]), constants, loops)
            at += 1
        else:
            depth, otherwise, end = 0, None, None
            for i in range(at + 1, len(lines)):
                word = lines[i].strip()[1:].split()[:1] if lines[i].strip().startswith("#") else [""]
                if word[0] in ("if", "for"):
                    depth += 1
                elif word[0] == "else" and depth == 0:
                    otherwise = i
                elif word[0] == "end":
                    if depth == 0:
                        end = i
                        break
                    depth -= 1
            if words[0] == "if":
                truth = (constants.get(words[1].lstrip("!"), 0) != 0) != words[1].startswith("!")
                middle = end if otherwise is None else otherwise
                out += expand(lines[at + 1 : middle] if truth else lines[middle + 1 : end], constants, loops)
            else:
                count = int(words[2]) if words[2].isdigit() else constants[words[2]]
                for value in range(count):
                    out += expand(lines[at + 1 : end], constants, (*loops, ("{%s}" % words[1], value)))
            at = end + 1
    return out


def shader(name):
    return open(f"{ROOT}/shaders/{name}.wgsl").read().splitlines()


HEAD = "enable f16;\nenable wgpu_cooperative_matrix;\n"


class Runner:
    def __init__(self, program):
        self.program, self.folder, self.jobs = program, tempfile.mkdtemp(), []

    def path(self, name):
        return os.path.join(self.folder, re.sub(r"[^a-zA-Z0-9_.]", "_", name))

    def file(self, name, array):
        array.tofile(self.path(name))
        return {"bytes": array.nbytes, "file": self.path(name)}

    def job(self, name, source, buffers, grid, repeats=0):
        with open(self.path(name + ".wgsl"), "w") as file:
            file.write(source)
        self.jobs.append({"name": name, "wgsl": self.path(name + ".wgsl"), "buffers": buffers, "grid": grid, "repeats": repeats})

    def run(self):
        with open(self.path("jobs.json"), "w") as file:
            json.dump(self.jobs, file)
        done = subprocess.run([self.program, self.path("jobs.json")], capture_output=True, text=True)
        if done.returncode or "failed" in done.stderr:
            print(done.stderr[:300], done.stderr[-300:])
        results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not results:
            print("no device")
        self.jobs = []
        return {result["name"]: result for result in results if "name" in result}


# ---- attention: which phase is wrong -------------------------------------------------------------------------------


def attention(runner):
    tokens, heads, kv_heads, dim = 128, 2, 1, 64
    columns = (heads + 2 * kv_heads) * dim
    random = np.random.default_rng(7)
    noise = random.uniform(-2, 2, (tokens, columns)).astype("f2")
    coded = noise.copy()
    # Values that tell where they come from: key * 64 + column, exact in f16 for 32 keys.
    coded[:, (heads + kv_heads) * dim :] = (np.arange(tokens) % 32)[:, None] * 64 + np.arange(dim)[None, :]
    parameters = {"group": heads // kv_heads, "tiles": tokens // 64, "tokens": tokens, "stride": columns, "heads": heads,
                  "key_start": heads * dim, "value_start": (heads + kv_heads) * dim, "output_stride": heads * dim}
    constants = {"HALF": 1, "COOPERATIVE": 1, "HEAD_DIM": dim, "CHUNKS": 1, "FRAGMENTS": dim // 16, "LOADS": dim // 16}
    declared = HEAD + "".join(f"const {name}: u32 = {value}u;\n" for name, value in constants.items())
    declared += "struct Parameters { " + "".join(f"{name}: u32, " for name in parameters) + "scale: f32, }\n"
    declared += """@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read_write> qkv: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> document_start: array<i32>;
fn document_start_get(i: u32) -> i32 { return document_start[i]; }
@group(0) @binding(3) var<storage, read_write> output: array<vec4<f32>>;
fn output_put4(i: u32, v: vec4<f32>) { output[i >> 2u] = v; }
@group(0) @binding(4) var<storage, read_write> log_sum_exp: array<f32>;
fn log_sum_exp_put(i: u32, v: f32) { log_sum_exp[i] = v; }
"""
    base = declared + "\n".join(expand(shader("attention_cooperative"), constants)) + "\n"
    put = "probability_tile[row * 10u + half * 4u + {v}u] = vec4<f16>(y{v});"

    def sub(source, old, new, count=None):
        assert old in source, old
        return source.replace(old, new) if count is None else source.replace(old, new, count)

    def identity(source):
        for v in range(4):
            ones = "".join(f"f16(select(0.0, 1.0, key0 == 0u && half * 16u + {v * 4 + i}u == row % 32u)), " for i in range(4))
            source = sub(source, put.format(v=v), f"probability_tile[row * 10u + half * 4u + {v}u] = vec4<f16>({ones});")
        return sub(source, "let inverse = 1.0 / total;", "let inverse = 1.0;")

    def no_shrink(source):
        start = source.index("    if (workgroupUniformLoad(&flags[1]) != 0u) {")
        end = source.index("    {\n      let ip =")
        return source[:start] + "    workgroupBarrier();\n" + source[end:]

    def barriers(source):
        return re.sub(r"(\n +)(let probability = coopLoadT)", r"\1workgroupBarrier(); storageBarrier();\1\2", source)

    def value_from_global(source):
        return re.sub(r"let iv = (\d)u \* 16u \* PITCH \+ (\d)u \* 4u;\s+let pv = PITCH;\s+let value = coopLoadT<coop_mat16x16<f16, B>>\(&value_tile\[iv\], pv\);",
                      r"let iv = (key0 + \1u * 16u) * stride4 + value4 + \2u * 4u;\n let pv = stride4;\n let value = coopLoadT<coop_mat16x16<f16, B>>(&qkv[iv], pv);", source)

    def no_prefetch(source):
        for kind in ("key", "value"):
            for r in range(constants["LOADS"]):
                source = re.sub(rf"\n +var next_{kind}{r} = ([^;]*);", "", source)
                source = re.sub(rf"\n +next_{kind}{r} = ([^;]*);", "", source)
                load = f"qkv[(key0 + (thread + {r}u * 128u) / D4) * stride4 + {kind}4 + (thread + {r}u * 128u) % D4]"
                source = sub(source, f"= next_{kind}{r};", f"= {load};")
        return source

    def probability_shown(source):
        """Writes the tile of probabilities itself, as others read it, for the first 32 keys."""
        start = source.index("    {\n      let ip =")
        shown = "".join(f"if (key0 == 0u) {{ output_put4(query * p.output_stride + head * HEAD_DIM + half * 16u + {v * 4}u, vec4<f32>(probability_tile[(row ^ 1u) * 10u + half * 4u + {v}u])); }}\n" for v in range(4))
        source = source[:start] + shown + source[start:]
        return re.sub(r"output_put4\(at[^;]*;", "", source)

    def value_shown(source):
        start = source.index("    {\n      let ip =")
        shown = "".join(f"if (key0 == 0u) {{ output_put4(query * p.output_stride + head * HEAD_DIM + half * 32u + {v * 4}u, vec4<f32>(value_tile[(row % 32u) * PITCH + half * 8u + {v}u])); }}\n" for v in range(8))
        source = source[:start] + shown + source[start:]
        return re.sub(r"output_put4\(at[^;]*;", "", source)

    def separate_stage(source):
        source = sub(source, "var<workgroup> flags: array<u32, 4>;", "var<workgroup> flags: array<u32, 4>;\nvar<workgroup> out_tile: array<vec4<f32>, 576>;")
        start = source.index("let inverse = ")
        return source[:start] + source[start:].replace("score_tile", "out_tile")

    def direct(source):
        """The output's fragments straight to the buffer, not divided."""
        start = source.index("let inverse = ")
        tail = "let inverse = 1.0;\n"
        for d in range(constants["FRAGMENTS"]):
            tail += f"  let jo{d} = ((first + subgroup * 16u) * p.output_stride + head * HEAD_DIM + {d * 16}u) / 4u;\n  let po{d} = p.output_stride / 4u;\n  coopStoreT(o{d}, &output[jo{d}], po{d});\n"
        return source[:start] + tail + "}\n"

    def scalar_tile(source):
        source = sub(source, "var<workgroup> probability_tile: array<vec4<f16>, 640>;", "var<workgroup> probability_tile: array<f16, 2560>;")
        for v in range(4):
            source = sub(source, put.format(v=v), "\n".join(f"probability_tile[row * 40u + half * 16u + {v * 4 + i}u] = f16(y{v}[{i}]);" for i in range(4)))
        for q in range(2):
            source = sub(source, f"let ip = subgroup * 160u + {q}u * 4u;", f"let ip = subgroup * 640u + {q * 16}u;")
        return sub(source, "let pp = 10u;", "let pp = 40u;")

    def value_by_columns(source):
        return source.replace("let value = coopLoadT<", "let value = coopLoad<")

    def probability_by_columns(source):
        return source.replace("let probability = coopLoadT<", "let probability = coopLoad<")

    def one_by_one(source):
        """A fresh accumulator for each product, added by matrix addition."""
        return re.sub(r"o(\d) = coopMultiplyAdd\(probability, value, o\1\);", r"let fresh = coopMultiplyAdd(probability, value, coop_mat16x16<f32, C>()); o\1 = o\1 + fresh;", source)

    def zeroed(source):
        """Accumulators zeroed by reading a zeroed tile, not by a constant."""
        source = re.sub(r"\n +var o(\d) = coop_mat16x16<f32, C>\(\);", r"\n  let zo\1 = subgroup * 144u; let zp\1 = 9u; var o\1 = coopLoadT<coop_mat16x16<f32, C>>(&score_tile[zo\1], zp\1);", source)
        return sub(source, "  let begin = workgroupUniformLoad", "  for (var i = thread; i < 576u; i += 128u) { score_tile[i] = vec4<f32>(); }\n  workgroupBarrier();\n  let begin = workgroupUniformLoad")

    variants = {"as it is": base} if "brief" in sys.argv else {"as it is": base, "no shrinking": no_shrink(base), "barriers": barriers(base), "value from global": value_from_global(base),
                "no prefetch": no_prefetch(base), "separate stage": separate_stage(base), "scalar tile": scalar_tile(base),
                "value by columns": value_by_columns(base), "probability by columns": probability_by_columns(base),
                "one by one": one_by_one(base), "zeroed by load": zeroed(base), "no shrinking, no prefetch, barriers": barriers(no_prefetch(no_shrink(base)))}
    shown = {"identity": identity(base)} if "brief" in sys.argv else {"identity": identity(base), "identity, no shrinking": identity(no_shrink(base)), "identity direct": direct(identity(base)),
             "identity, value from global": identity(value_from_global(base)), "identity, value by columns": identity(value_by_columns(base)),
             "probability shown": probability_shown(base), "value shown": value_shown(base)}
    bytes_of = np.zeros(16, "u4")
    bytes_of[: len(parameters)] = list(parameters.values())
    bytes_of[len(parameters)] = np.array([dim**-0.5], "f4").view("u4")[0]
    q = noise[:, : heads * dim].astype("f8").reshape(tokens, heads, dim)
    k = noise[:, heads * dim : (heads + 1) * dim].astype("f8")
    v = noise[:, (heads + 1) * dim :].astype("f8")
    score = np.where(np.tri(tokens, dtype=bool)[None], np.einsum("thd,sd->hts", q, k) * dim**-0.5, -np.inf)
    p = np.exp(score - score.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    want = np.einsum("hts,sd->thd", p, v)

    def submit(name, source, data):
        runner.job(name, source, [
            {**runner.file("parameters", bytes_of), "uniform": True}, runner.file("coded" if data is coded else "noise", data),
            runner.file("starts", np.zeros(tokens, "i4")),
            {"bytes": tokens * heads * dim * 4, "keep": runner.path(name + ".out")}, {"bytes": tokens * heads * 4}], [tokens // 64, heads, 1])

    for name, source in variants.items():
        submit(name, source, noise)
    for name, source in shown.items():
        submit(name, source, noise if name.startswith("probability") else coded)
    results = runner.run()
    for name in variants:
        if results.get(name, {}).get("error"):
            print(f"{name}: {results[name]['error'][:300]}")
            continue
        got = np.fromfile(runner.path(name + ".out"), "f4").reshape(tokens, heads, dim).astype("f8")
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        blocks = [np.linalg.norm((got - want)[r : r + 16, 0]) / np.linalg.norm(want[r : r + 16, 0]) for r in range(0, 64, 16)]
        print(f"{name}: output off by {error:.1e}; rows of 16, head 0: {' '.join(f'{b:.1e}' for b in blocks)}")
    for name in shown:
        if results.get(name, {}).get("error"):
            print(f"{name}: {results[name]['error'][:300]}")
            continue
        got = np.fromfile(runner.path(name + ".out"), "f4").reshape(tokens, heads, dim)
        if name == "probability shown":
            raw = np.exp(score[0] - score[0][:, :32].max(1, keepdims=True))
            swapped = raw[np.arange(64) ^ 1][:, :32]
            print(f"{name}: off by {np.linalg.norm(got[:64, 0, :32] - swapped) / np.linalg.norm(swapped):.1e}")
            continue
        expected = (np.arange(64) % 32)[:, None] * 64 + np.arange(dim)[None]
        print(f"{name}: {'as expected' if np.array_equal(got[:64, 0], expected) else 'NOT as expected'}; key.column read, rows 0, 1, 2, 8, 17 by columns 0, 1, 2, 3, 8, 9, 16, 33:")
        for row in (0, 1, 2, 8, 17):
            print("   ", " ".join(f"{int(x) // 64}.{int(x) % 64}" if float(x).is_integer() else f"{x:.2f}" for x in got[row, 0, [0, 1, 2, 3, 8, 9, 16, 33]]))


# ---- products: every candidate -------------------------------------------------------------------------------------


def product(layout, m, n, k, bm, bn, bk, sm, sn, mode, f16_out=True, pad=2):
    """C[m, n] = op(A) op(B) of f16; layout as in lower/product.rs. `mode`: single, regs or double."""
    threads = sm * sn * 32
    a_by_k, b_by_k = layout != "TN", layout == "NT"
    a_rows, a_width = (bm, bk) if a_by_k else (bk, bm)
    b_rows, b_width = (bn, bk) if b_by_k else (bk, bn)
    a_pitch, b_pitch = a_width // 4 + pad, b_width // 4 + pad
    a_size, b_size = a_rows * a_pitch, b_rows * b_pitch
    fm, fn = bm // sm // 16, bn // sn // 16
    copies = 2 if mode == "double" else 1
    unit = 4
    a_loads, b_loads = a_rows * a_width // unit // threads, b_rows * b_width // unit // threads
    if a_loads == 0 or b_loads == 0 or (a_rows * a_width // unit) % threads or (b_rows * b_width // unit) % threads:
        return None
    shared = copies * (a_size + b_size) * 8 + sm * sn * 1024
    if shared > 48 * 1024:
        return None
    s = HEAD + f"""@group(0) @binding(0) var<storage, read> a: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> c: array<vec4<{'f16' if f16_out else 'f32'}>>;
var<workgroup> ta: array<vec4<f16>, {a_size * copies}>;
var<workgroup> tb: array<vec4<f16>, {b_size * copies}>;
var<workgroup> staged: array<vec4<f32>, {64 * sm * sn}>;
@compute @workgroup_size({threads})
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32, @builtin(subgroup_id) sg: u32, @builtin(subgroup_invocation_id) lane: u32) {{
  let row0 = g.y * {bm}u; let col0 = g.x * {bn}u;
  let sr = (sg / {sn}u) * {fm * 16}u; let sc = (sg % {sn}u) * {fn * 16}u;
"""
    for i, j in itertools.product(range(fm), range(fn)):
        s += f"  var c{i}_{j} = coop_mat16x16<f32, C>();\n"

    def where(name, r):
        width, by_k, stride, origin = (a_width, a_by_k, k if a_by_k else m, "row0") if name == "a" else (b_width, b_by_k, k if b_by_k else n, "col0")
        i, u = f"(t + {r * threads}u)", width // unit
        if by_k:
            return f"{name}[({origin} + {i} / {u}u) * {stride // unit}u + k0 / {unit}u + {i} % {u}u]"
        return f"{name}[(k0 + {i} / {u}u) * {stride // unit}u + {origin} / {unit}u + {i} % {u}u]"

    def put(name, r, value):
        width, pitch = (a_width, a_pitch) if name == "a" else (b_width, b_pitch)
        i, u = f"(t + {r * threads}u)", width // unit
        return f"    t{name}[{name}_at + {i} / {u}u * {pitch}u + {i} % {u}u] = {value};\n"

    loads = [("a", r) for r in range(a_loads)] + [("b", r) for r in range(b_loads)]

    def compute():
        out = ""
        for q in range(bk // 16):
            out += "    {\n"
            for i in range(fm):
                at = f"(sr + {i * 16}u) * {a_pitch}u + {q * 4}u" if a_by_k else f"{q * 16 * a_pitch}u + (sr + {i * 16}u) / 4u"
                out += f"      let ia{i} = a_use + {at}; let ja{i} = {a_pitch}u; let a{i} = {'coopLoadT' if a_by_k else 'coopLoad'}<coop_mat16x16<f16, A>>(&ta[ia{i}], ja{i});\n"
            for j in range(fn):
                at = f"(sc + {j * 16}u) * {b_pitch}u + {q * 4}u" if b_by_k else f"{q * 16 * b_pitch}u + (sc + {j * 16}u) / 4u"
                out += f"      let ib{j} = b_use + {at}; let jb{j} = {b_pitch}u; let b{j} = {'coopLoad' if b_by_k else 'coopLoadT'}<coop_mat16x16<f16, B>>(&tb[ib{j}], jb{j});\n"
            for i, j in itertools.product(range(fm), range(fn)):
                out += f"      c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});\n"
            out += "    }\n"
        return out

    if mode == "single":
        s += f"  let a_at = 0u; let b_at = 0u; let a_use = 0u; let b_use = 0u;\n  for (var k0 = 0u; k0 < {k}u; k0 += {bk}u) {{\n"
        s += "".join(put(n_, r, where(n_, r)) for n_, r in loads)
        s += "    workgroupBarrier();\n" + compute() + "    workgroupBarrier();\n  }\n"
    else:
        s += "  var k0 = 0u;\n" + "".join(f"  var n{n_}{r} = {where(n_, r)};\n" for n_, r in loads)
        if mode == "regs":
            s += f"  let a_at = 0u; let b_at = 0u; let a_use = 0u; let b_use = 0u;\n  for (var step = 0u; step < {k // bk}u; step++) {{\n"
            s += "".join(put(n_, r, f"n{n_}{r}") for n_, r in loads) + "    workgroupBarrier();\n"
            s += f"    k0 = min(k0 + {bk}u, {k - bk}u);\n" + "".join(f"    n{n_}{r} = {where(n_, r)};\n" for n_, r in loads)
            s += compute() + "    workgroupBarrier();\n  }\n"
        else:
            s += "  {let a_at = 0u; let b_at = 0u;\n" + "".join(put(n_, r, f"n{n_}{r}") for n_, r in loads) + "  }\n  workgroupBarrier();\n"
            s += f"  for (var step = 0u; step < {k // bk}u; step++) {{\n    k0 = min(k0 + {bk}u, {k - bk}u);\n"
            s += f"    let a_use = (step & 1u) * {a_size}u; let b_use = (step & 1u) * {b_size}u; let a_at = {a_size}u - a_use; let b_at = {b_size}u - b_use;\n"
            s += "".join(f"    n{n_}{r} = {where(n_, r)};\n" for n_, r in loads) + compute()
            s += "".join(put(n_, r, f"n{n_}{r}") for n_, r in loads) + "    workgroupBarrier();\n  }\n"
    for i, j in itertools.product(range(fm), range(fn)):
        if f16_out:
            s += f"""  {{ let o = sg * 64u; let so = 4u; coopStoreT(c{i}_{j}, &staged[o], so); workgroupBarrier();
    for (var e = lane; e < 64u; e += 32u) {{ c[((row0 + sr + {i * 16}u + e / 4u) * {n}u + col0 + sc + {j * 16}u) / 4u + e % 4u] = vec4<f16>(staged[o + e]); }}
    workgroupBarrier(); }}
"""
        else:
            s += f"  {{ let o = ((row0 + sr + {i * 16}u) * {n}u + col0 + sc + {j * 16}u) / 4u; let so = {n // 4}u; coopStoreT(c{i}_{j}, &c[o], so); }}\n"
    return s + "}\n"


def half_noise(count, size):
    i = np.arange(count, dtype=np.uint64) & np.uint64(0xFFFF)
    mask = np.uint64(0xFFFFFFFF)
    i ^= i >> np.uint64(16)
    i = i * np.uint64(0x7FEB352D) & mask
    i ^= i >> np.uint64(15)
    i = i * np.uint64(0x846CA68B) & mask
    i ^= i >> np.uint64(16)
    return ((i >> np.uint64(8)).astype("f8") / 8388608.0 - 1.0) * size


TILES = [(128, 128, 32, 2, 2), (128, 128, 64, 2, 2), (128, 128, 32, 2, 4), (128, 256, 32, 2, 4), (256, 128, 32, 4, 2), (128, 64, 32, 2, 1), (64, 64, 32, 2, 2)]


def products(runner, shapes):
    names, wanted, results = {}, {}, {}
    for (m, k, n), layout, mode in itertools.product(shapes, ("NT", "NN", "TN"), ("single", "regs", "double", "f32")):
        # Tokens m, inputs k, outputs n: forward, gradient of the input, gradient of the weight.
        pm, pn, pk = {"NT": (m, n, k), "NN": (m, k, n), "TN": (n, k, m)}[layout]
        for tile in TILES if layout == "NT" else TILES[:4]:
            bm, bn, bk = tile[:3]
            if pm % bm or pn % bn or pk % bk or (mode == "f32" and tile != TILES[0]):
                continue
            source = product(layout, pm, pn, pk, *tile, "single" if mode == "f32" else mode, mode != "f32")
            if source is None:
                continue
            name = f"{layout} {pm}x{pn}x{pk} tile {bm}x{bn}x{bk} of {tile[3]}x{tile[4]} {mode}"
            size = 4 if mode == "f32" else 2
            buffers = [{"bytes": pm * pk * 2, "noise": 0.5}, {"bytes": pn * pk * 2, "noise": 0.4},
                       {"bytes": pm * pn * size, "keep": runner.path("out " + name), "keep_bytes": 256 * pn * size}]
            names[name] = (layout, pm, pn, pk)
            runner.job(name, source, buffers, [pn // bn, pm // bm, 1], 5)
        # A process of its own: a shader that the driver does not compile takes the device with it.
        if runner.jobs:
            results |= runner.run()
    best = {}
    for name, (layout, pm, pn, pk) in names.items():
        result = results.get(name, {"error": "no result"})
        if result.get("error") or not result.get("seconds"):
            print(f"{name}: {result.get('error')}"[:300])
            continue
        out = np.fromfile(runner.path("out " + name), "f4" if name.endswith("f32") else "f2").reshape(256, pn)
        key = (layout, pm, pn, pk)
        if key not in wanted:
            a = half_noise(pm * pk, 0.5).astype("f2").astype("f4")
            b = half_noise(pn * pk, 0.4).astype("f2").astype("f4")
            a = a.reshape(pm, pk) if layout != "TN" else a.reshape(pk, pm).T
            b = b.reshape(pn, pk).T if layout == "NT" else b.reshape(pk, pn)
            rows, columns = [0, 1, 77, 130, 255], [0, 2, pn // 3, pn - 1, 131]
            wanted[key] = (rows, columns, a[rows].astype("f8") @ b[:, columns].astype("f8"))
        rows, columns, want = wanted[key]
        error = np.linalg.norm(out[np.ix_(rows, columns)].astype("f8") - want) / np.linalg.norm(want)
        rate = 2.0 * pm * pn * pk / result["seconds"] / 1e12
        print(f"{rate:7.1f} TFLOP/s {'ok ' if error < 2e-3 else 'BAD'} {error:.0e} {name} (compiled in {result['compiled']:.2f} s)")
        if error < 2e-3:
            best[key] = max(best.get(key, (0, "")), (rate, name))
        os.remove(runner.path("out " + name))
    print("best:")
    for rate, name in best.values():
        print(f"{rate:7.1f} TFLOP/s {name}")


def pytorch(shapes):
    import torch
    for (m, k, n), dtype in itertools.product(shapes, (torch.bfloat16, torch.float16)):
        x, w, g = (torch.randn(s, device="cuda", dtype=dtype) for s in ((m, k), (n, k), (m, n)))
        for what, call in (("forward", lambda: x @ w.T), ("input", lambda: g @ w), ("weight", lambda: g.T @ x)):
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            print(f"PyTorch {dtype} {what} {m}x{k}x{n}: {40.0 * m * n * k / (time.perf_counter() - begun) / 1e12:.1f} TFLOP/s")


if __name__ == "__main__":
    shapes = [(4096, 4096, 4096), (4096, 14336, 4096)]
    for what in sys.argv[2:]:
        if what == "brief":
            continue
        print(f"== {what}", flush=True)
        begun = time.perf_counter()
        runner = Runner(sys.argv[1])
        if what == "attention":
            attention(runner)
        elif what == "products":
            products(runner, shapes)
        elif what == "square":
            products(runner, shapes[:1])
        elif what == "small":
            products(runner, [(4096, 576, 1536)])
        elif what == "pytorch":
            pytorch(shapes)
        print(f"{time.perf_counter() - begun:.0f} s", flush=True)
