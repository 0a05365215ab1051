// C = alpha · op(A) · op(B) + bias (+ C), sums in f32; [m, n] = sum over k.
//
//   A_BY_K  A is stored [m, k]; else [k, m] and used transposed
//   B_BY_K  B is stored [n, k] (a weight used transposed); else [k, n]
//   SECOND  the sum goes on over a second pair, A2 [m, k2] times B2 (the LoRA branch); B2_BY_K  B2 is stored [n, k2]
//   SEGMENTED  columns n (SEGMENT_ROWS: rows m) belong to projections that lie side by side, with LoRA columns
//              of their own: the projection's number times `rank` is added to the column of A2 (of B)
//   SPLIT   each z of the grid sums a part of k into its own layer of C, to be added by partial_sum
//   DROP_A, DROP_B, DROP_C  dropout on the elements of A [m, k], of B [k, n] or of the product [m, n]
//
// A tile of BM x BN is summed in steps of BK staged in workgroup memory; each thread keeps TM4*4 x TN4*4.
#if DROPOUT
#include random
var<private> stream: u32;
fn keep(row: u32, column: u32) -> f32 {
#if LATER_ROWS
  return select(0.0, p.keep_scale, random_uniform(stream, p.first_row + row, column) >= p.probability);
#else
  return select(0.0, p.keep_scale, random_uniform(stream, row, column) >= p.probability);
#end
}
fn keep4(row: u32, column: u32) -> vec4<f32> {
  return vec4<f32>(keep(row, column), keep(row, column + 1u), keep(row, column + 2u), keep(row, column + 3u));
}
#end

const THREADS: u32 = (BM / (TM4 * 4u)) * (BN / (TN4 * 4u));
var<workgroup> tile_a: array<vec4<f32>, BK * BM / 4u>;
var<workgroup> tile_b: array<vec4<f32>, BK * BN / 4u>;

#if SEGMENTED
fn segment(index: u32) -> u32 {
  return p.rank * (select(0u, 1u, index >= p.segment1) + select(0u, 1u, index >= p.segment2) + select(0u, 1u, index >= p.segment3));
}
#end

// Rows past the end repeat the last one: their results are not stored. Past the end of k everything is 0.
#if A_BY_K
fn a_row(row: u32, k: u32) -> vec4<f32> {
  let at = min(row, p.m - 1u) * p.a_stride + p.a_start + k;
#if VECTOR_A
#if !EXACT
  if (k >= p.k) { return vec4<f32>(); }
#end
  var value = a_get4(at);
#else
  var value = vec4<f32>();
  if (k < p.k) { value.x = a_get(at); }
  if (k + 1u < p.k) { value.y = a_get(at + 1u); }
  if (k + 2u < p.k) { value.z = a_get(at + 2u); }
  if (k + 3u < p.k) { value.w = a_get(at + 3u); }
#end
#if DROP_A
  value *= keep4(row, k);
#end
  return value;
}
fn a_block(m: u32, k: u32) -> mat4x4<f32> {
  return transpose(mat4x4<f32>(a_row(m, k), a_row(m + 1u, k), a_row(m + 2u, k), a_row(m + 3u, k)));
}
#else
fn a_column(m: u32, k: u32) -> vec4<f32> {
#if !EXACT
  if (k >= p.k) { return vec4<f32>(); }
#end
  let base = k * p.a_stride + p.a_start;
#if VECTOR_A
  return a_get4(base + min(m, p.m - 4u));
#else
  let last = p.m - 1u;
  return vec4<f32>(a_get(base + min(m, last)), a_get(base + min(m + 1u, last)),
                   a_get(base + min(m + 2u, last)), a_get(base + min(m + 3u, last)));
#end
}
fn a_block(m: u32, k: u32) -> mat4x4<f32> {
  return mat4x4<f32>(a_column(m, k), a_column(m, k + 1u), a_column(m, k + 2u), a_column(m, k + 3u));
}
#end

#if B_BY_K
fn b_row(row: u32, k: u32) -> vec4<f32> {
  let at = min(row, p.n - 1u) * p.b_stride + p.b_start + k;
#if VECTOR_B
#if !EXACT
  if (k >= p.k) { return vec4<f32>(); }
#end
  return b_get4(at);
#else
  var value = vec4<f32>();
  if (k < p.k) { value.x = b_get(at); }
  if (k + 1u < p.k) { value.y = b_get(at + 1u); }
  if (k + 2u < p.k) { value.z = b_get(at + 2u); }
  if (k + 3u < p.k) { value.w = b_get(at + 3u); }
  return value;
#end
}
fn b_block(n: u32, k: u32, extra: u32) -> mat4x4<f32> {
  return transpose(mat4x4<f32>(b_row(n, k), b_row(n + 1u, k), b_row(n + 2u, k), b_row(n + 3u, k)));
}
#else
fn b_column(n: u32, k: u32, extra: u32) -> vec4<f32> {
#if !EXACT
  if (k >= p.k) { return vec4<f32>(); }
#end
  let base = k * p.b_stride + p.b_start + extra;
#if VECTOR_B
  var value = b_get4(base + min(n, p.n - 4u));
#else
  let last = p.n - 1u;
  var value = vec4<f32>(b_get(base + min(n, last)), b_get(base + min(n + 1u, last)),
                        b_get(base + min(n + 2u, last)), b_get(base + min(n + 3u, last)));
#end
#if DROP_B
  value *= keep4(k, n);
#end
  return value;
}
fn b_block(n: u32, k: u32, extra: u32) -> mat4x4<f32> {
  return mat4x4<f32>(b_column(n, k, extra), b_column(n, k + 1u, extra), b_column(n, k + 2u, extra), b_column(n, k + 3u, extra));
}
#end

#if SECOND
// The second pair is thin: k2 is a LoRA rank.
fn a2_value(m: u32, k: u32, extra: u32) -> f32 {
  if (k >= p.k2) { return 0.0; }
#if SCALE_SECOND
  return scale_get(0u) * a2_get(min(m, p.m - 1u) * p.a2_stride + p.a2_start + extra + k);
#else
  return a2_get(min(m, p.m - 1u) * p.a2_stride + p.a2_start + extra + k);
#end
}
fn a2_block(m: u32, k: u32, extra: u32) -> mat4x4<f32> {
  var block = mat4x4<f32>();
#for j 4
  block[{j}] = vec4<f32>(a2_value(m, k + {j}u, extra), a2_value(m + 1u, k + {j}u, extra), a2_value(m + 2u, k + {j}u, extra), a2_value(m + 3u, k + {j}u, extra));
#end
  return block;
}
fn b2_value(n: u32, k: u32) -> f32 {
  if (k >= p.k2) { return 0.0; }
#if B2_BY_K
  return b2_get(min(n, p.n - 1u) * p.b2_stride + p.b2_start + k);
#else
  return b2_get(k * p.b2_stride + p.b2_start + min(n, p.n - 1u));
#end
}
fn b2_block(n: u32, k: u32) -> mat4x4<f32> {
  var block = mat4x4<f32>();
#for j 4
  block[{j}] = vec4<f32>(b2_value(n, k + {j}u), b2_value(n + 1u, k + {j}u), b2_value(n + 2u, k + {j}u), b2_value(n + 3u, k + {j}u));
#end
  return block;
}
#end

fn put_a(m4: u32, k4: u32, block: mat4x4<f32>) {
#for j 4
  tile_a[(k4 * 4u + {j}u) * (BM / 4u) + m4] = block[{j}];
#end
}
fn put_b(n4: u32, k4: u32, block: mat4x4<f32>) {
#for j 4
  tile_b[(k4 * 4u + {j}u) * (BN / 4u) + n4] = block[{j}];
#end
}

// Block number `i` of a tile, four rows by four columns; a thread may be one too many for the last round.
fn stage_a(i: u32, row0: u32, k0: u32) {
#if A_PARTIAL
  if (i >= BM * BK / 16u) { return; }
#end
#if A_BY_K
  let m4 = i / (BK / 4u);
  let k4 = i % (BK / 4u);
#else
  let m4 = i % (BM / 4u);
  let k4 = i / (BM / 4u);
#end
  put_a(m4, k4, a_block(row0 + m4 * 4u, k0 + k4 * 4u));
}
fn stage_b(i: u32, column0: u32, k0: u32, extra: u32) {
#if B_PARTIAL
  if (i >= BN * BK / 16u) { return; }
#end
#if B_BY_K
  let n4 = i / (BK / 4u);
  let k4 = i % (BK / 4u);
#else
  let n4 = i % (BN / 4u);
  let k4 = i / (BN / 4u);
#end
  put_b(n4, k4, b_block(column0 + n4 * 4u, k0 + k4 * 4u, extra));
}
#if SECOND
fn stage_a2(i: u32, row0: u32, k0: u32, extra: u32) {
#if A_PARTIAL
  if (i >= BM * BK / 16u) { return; }
#end
  let k4 = i % (BK / 4u);
  put_a(i / (BK / 4u), k4, a2_block(row0 + (i / (BK / 4u)) * 4u, k0 + k4 * 4u, extra));
}
fn stage_b2(i: u32, column0: u32, k0: u32) {
#if B_PARTIAL
  if (i >= BN * BK / 16u) { return; }
#end
  let k4 = i % (BK / 4u);
  put_b(i / (BK / 4u), k4, b2_block(column0 + (i / (BK / 4u)) * 4u, k0 + k4 * 4u));
}
#end

fn store4(row: u32, column: u32, sum: vec4<f32>, layer: u32) {
  if (row >= p.m || column >= p.n) { return; }
#if SPLIT
  let at = layer * p.m * p.n + row * p.n + column;
  var value = sum;
#else
  let at = row * p.c_stride + p.c_start + column;
  var value = sum * p.alpha;
#if SCALE
  value *= scale_get(0u);
#end
#if UNSCALE
  value *= unscale_get(0u);
#end
#if DROP_C
  value *= keep4(row, column);
#end
#end
#if VECTOR_C
#if BIAS
  value += bias_get4(column);
#end
#if ACCUMULATE
  value += c_get4(at);
#end
  c_put4(at, value);
#else
#for j 4
  if (column + {j}u < p.n) {
    var x = value[{j}];
#if BIAS
    x += bias_get(column + {j}u);
#end
#if ACCUMULATE
    x += c_get(at + {j}u);
#end
    c_put(at + {j}u, x);
  }
#end
#end
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
#if DROPOUT
  stream = random_stream(p.stream);
#end
  let row0 = group.y * BM;
  let column0 = group.x * BN;
  let thread_row = (thread / (BN / (TN4 * 4u))) * TM4;
  let thread_column = (thread % (BN / (TN4 * 4u))) * TN4;
#for i TM4
#for l 4
#for j TN4
  var sum_{i}_{l}_{j} = vec4<f32>();
#end
#end
#end
  let first_steps = (p.k + BK - 1u) / BK;
  var begin = 0u;
#if SECOND
  var end = first_steps + (p.k2 + BK - 1u) / BK;
#else
  var end = first_steps;
#end
#if SPLIT
  begin = group.z * p.split_steps;
  end = min(end, begin + p.split_steps);
#end
  var extra = 0u;
#if SEGMENTED
#if SEGMENT_ROWS
  extra = segment(row0);
#else
  extra = segment(column0);
#end
#end
  for (var step = begin; step < end; step++) {
    let k0 = step * BK;
#if SECOND
    if (step >= first_steps) {
      let k2 = (step - first_steps) * BK;
#for r A_ROUNDS
      stage_a2(thread + {r}u * THREADS, row0, k2, extra);
#end
#for r B_ROUNDS
      stage_b2(thread + {r}u * THREADS, column0, k2);
#end
    } else {
#end
#for r A_ROUNDS
      stage_a(thread + {r}u * THREADS, row0, k0);
#end
#for r B_ROUNDS
      stage_b(thread + {r}u * THREADS, column0, k0, extra);
#end
#if SECOND
    }
#end
    workgroupBarrier();
    for (var k = 0u; k < BK; k++) {
#for i TM4
      let a_{i} = tile_a[k * (BM / 4u) + thread_row + {i}u];
#end
#for j TN4
      let b_{j} = tile_b[k * (BN / 4u) + thread_column + {j}u];
#end
#for i TM4
#for l 4
#for j TN4
      sum_{i}_{l}_{j} = fma(vec4<f32>(a_{i}[{l}]), b_{j}, sum_{i}_{l}_{j});
#end
#end
#end
    }
    workgroupBarrier();
  }
#for i TM4
#for l 4
#for j TN4
  store4(row0 + (thread_row + {i}u) * 4u + {l}u, column0 + (thread_column + {j}u) * 4u, sum_{i}_{l}_{j}, group.z);
#end
#end
#end
}
