// matmul.wgsl on cooperative matrices: C = alpha · op(A) · op(B) + bias (+ C), f16 times f16 summed in f32 (for what
// A_BY_K, B_BY_K, SECOND, B2_BY_K, SEGMENTED and SPLIT mean see there).
//
// A tile of BM x BN belongs to SM x SN subgroups of 32 threads, each with FM x FN fragments of 16 x 16. Tiles keep
// the order in which their matrix is stored, rows padded by 8 halves against bank conflicts; what changes is how a
// fragment is read: coopLoadT takes rows, coopLoad columns.
//   DOUBLE  two tiles of each operand: while one is multiplied the next is on its way through registers, one barrier a
//           step; AHEAD  one tile, and the next through registers; neither: one tile, read when it is wanted
//   WIDE    reads of 16 bytes, as words; else of 8
//   WHOLE   the tiles cover the result exactly, and the operands' strides are constants
const THREADS: u32 = SM * SN * 32u;
alias Cell = vec4<f16>;
const CELL: u32 = 4u;
#if A_BY_K
const A_ROW: u32 = BK;
const A_SIZE: u32 = BM * (BK + 8u) / CELL;
#else
const A_ROW: u32 = BM;
const A_SIZE: u32 = BK * (BM + 8u) / CELL;
#end
#if B_BY_K
const B_ROW: u32 = BK;
const B_SIZE: u32 = BN * (BK + 8u) / CELL;
#else
const B_ROW: u32 = BN;
const B_SIZE: u32 = BK * (BN + 8u) / CELL;
#end
const A_PITCH: u32 = (A_ROW + 8u) / CELL;
const B_PITCH: u32 = (B_ROW + 8u) / CELL;
#if DOUBLE
var<workgroup> tile_a: array<Cell, A_SIZE * 2u>;
var<workgroup> tile_b: array<Cell, B_SIZE * 2u>;
#else
var<workgroup> tile_a: array<Cell, A_SIZE>;
var<workgroup> tile_b: array<Cell, B_SIZE>;
#end
var<workgroup> staged: array<vec4<f32>, 64u * SM * SN>;

// What a thread reads at once: READ halves.
#if WIDE
struct Read { low: vec4<f16>, high: vec4<f16> }
const READ: u32 = 8u;
fn halves(words: vec2<u32>) -> Cell {
  return Cell(vec2<f16>(unpack2x16float(words.x)), vec2<f16>(unpack2x16float(words.y)));
}
fn a_read(at: u32) -> Read { let w = a[at >> 3u]; return Read(halves(w.xy), halves(w.zw)); }
fn b_read(at: u32) -> Read { let w = b[at >> 3u]; return Read(halves(w.xy), halves(w.zw)); }
#else
alias Read = Cell;
const READ: u32 = CELL;
fn a_read(at: u32) -> Read { return a_get4h(at); }
fn b_read(at: u32) -> Read { return b_get4h(at); }
#end

#if SEGMENTED
fn segment(index: u32) -> u32 {
  return p.rank * (select(0u, 1u, index >= p.segment1) + select(0u, 1u, index >= p.segment2) + select(0u, 1u, index >= p.segment3));
}
#end

// Rows of a tile in the order in which threads take them: neighbours go to rows four apart, whose banks are disjoint.
fn spread(row: u32) -> u32 {
  return (row & 0xfffffff8u) | ((row & 1u) << 2u) | ((row >> 1u) & 3u);
}
fn a_row(i: u32) -> u32 { return spread(i / (A_ROW / READ)); }
fn b_row(i: u32) -> u32 { return spread(i / (B_ROW / READ)); }
fn a_column(i: u32) -> u32 { return (i % (A_ROW / READ)) * READ; }
fn b_column(i: u32) -> u32 { return (i % (B_ROW / READ)) * READ; }

// Read number `i` of A's tile. Rows past the end repeat the last one: their results are not stored. Past the end of k
// everything is 0.
fn a_load(i: u32, row0: u32, k0: u32) -> Read {
#if WHOLE
#if A_BY_K
  return a_read((row0 + a_row(i)) * A_STRIDE + p.a_start + k0 + a_column(i));
#else
  return a_read((k0 + a_row(i)) * A_STRIDE + p.a_start + row0 + a_column(i));
#end
#else
#if A_BY_K
  let row = min(row0 + a_row(i), p.m - 1u);
  let k = k0 + a_column(i);
#else
  let k = k0 + a_row(i);
  let row = min(row0 + a_column(i), p.m - READ);
#end
#if !EXACT
  if (k >= p.k) { return Read(); }
#end
#if A_BY_K
  return a_read(row * p.a_stride + p.a_start + k);
#else
  return a_read(k * p.a_stride + p.a_start + row);
#end
#end
}

fn b_load(i: u32, column0: u32, k0: u32, extra: u32) -> Read {
#if WHOLE
#if B_BY_K
  return b_read((column0 + b_row(i)) * B_STRIDE + p.b_start + k0 + b_column(i));
#else
  return b_read((k0 + b_row(i)) * B_STRIDE + p.b_start + extra + column0 + b_column(i));
#end
#else
#if B_BY_K
  let column = min(column0 + b_row(i), p.n - 1u);
  let k = k0 + b_column(i);
#else
  let k = k0 + b_row(i);
  let column = min(column0 + b_column(i), p.n - READ);
#end
#if !EXACT
  if (k >= p.k) { return Read(); }
#end
#if B_BY_K
  return b_read(column * p.b_stride + p.b_start + k);
#else
  return b_read(k * p.b_stride + p.b_start + extra + column);
#end
#end
}

fn a_stage(base: u32, i: u32, value: Read) {
  let slot = base + a_row(i) * A_PITCH + a_column(i) / CELL;
#if WIDE
  tile_a[slot] = value.low;
  tile_a[slot + 1u] = value.high;
#else
  tile_a[slot] = value;
#end
}

fn b_stage(base: u32, i: u32, value: Read) {
  let slot = base + b_row(i) * B_PITCH + b_column(i) / CELL;
#if WIDE
  tile_b[slot] = value.low;
  tile_b[slot + 1u] = value.high;
#else
  tile_b[slot] = value;
#end
}

#if SECOND
// The second pair is thin: four halves at a time, k2 a LoRA rank. Cell number `i` of its tiles.
fn a2_cell(i: u32, row0: u32, k0: u32, extra: u32) -> Cell {
  let row = min(row0 + i / (BK / CELL), p.m - 1u);
  let k = k0 + (i % (BK / CELL)) * CELL;
  if (k >= p.k2) { return Cell(); }
#if SCALE_SECOND
  return a2_get4h(row * p.a2_stride + p.a2_start + extra + k) * f16(scale_get(0u));
#else
  return a2_get4h(row * p.a2_stride + p.a2_start + extra + k);
#end
}
fn b2_cell(i: u32, column0: u32, k0: u32) -> Cell {
#if B_BY_K
  let column = min(column0 + i / (BK / CELL), p.n - 1u);
  let k = k0 + (i % (BK / CELL)) * CELL;
  if (k >= p.k2) { return Cell(); }
  return b2_get4h(column * p.b2_stride + p.b2_start + k);
#else
  let k = k0 + i / (BN / CELL);
  let column = min(column0 + (i % (BN / CELL)) * CELL, p.n - CELL);
  if (k >= p.k2) { return Cell(); }
#if B2_BY_K
  let at = column * p.b2_stride + p.b2_start + k;
  return Cell(vec4<f32>(b2_get(at), b2_get(at + p.b2_stride), b2_get(at + 2u * p.b2_stride), b2_get(at + 3u * p.b2_stride)));
#else
  return b2_get4h(k * p.b2_stride + p.b2_start + column);
#end
#end
}
fn second_stage(i: u32, row0: u32, column0: u32, k0: u32, extra: u32) {
  if (i < BM * BK / CELL) {
    tile_a[i / (BK / CELL) * A_PITCH + i % (BK / CELL)] = a2_cell(i, row0, k0, extra);
  }
  if (i < BN * BK / CELL) {
    tile_b[i / (B_ROW / CELL) * B_PITCH + i % (B_ROW / CELL)] = b2_cell(i, column0, k0);
  }
}
#end

fn store4(row: u32, column: u32, sum: vec4<f32>, layer: u32) {
#if !WHOLE
  if (row >= p.m || column >= p.n) { return; }
#end
#if SPLIT
  c_put4(layer * p.m * p.n + row * p.n + column, sum);
#else
  let at = row * p.c_stride + p.c_start + column;
  var value = sum * p.alpha;
#if SCALE
  value *= scale_get(0u);
#end
#if UNSCALE
  value *= unscale_get(0u);
#end
#if BIAS
  value += bias_get4(column);
#end
#if ACCUMULATE
  value += c_get4(at);
#end
  c_put4(at, value);
#end
}

// Tiles are taken in bands of 16 rows, column by column: those that run at the same time share what they read.
fn place(group: vec2<u32>, groups: vec2<u32>) -> vec2<u32> {
  let index = group.y * groups.x + group.x;
  let first = index / (16u * groups.x) * 16u;
  let rows = min(16u, groups.y - first);
  let inside = index - first * groups.x;
  return vec2<u32>(inside / rows, first + inside % rows);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32,
        @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {
  let tile = place(group.xy, groups.xy);
  let row0 = tile.y * BM;
  let column0 = tile.x * BN;
  let sub_row = (subgroup / SN) * (FM * 16u);
  let sub_column = (subgroup % SN) * (FN * 16u);
#for i FM
#for j FN
  var c{i}_{j} = coop_mat16x16<f32, C>();
#end
#end
  var begin = 0u;
  var end = (p.k + BK - 1u) / BK;
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
#for r A_LOADS
  var a_next{r}: Read;
#end
#for r B_LOADS
  var b_next{r}: Read;
#end
#if DOUBLE
  {
    let k0 = begin * BK;
    let a_base = 0u;
    let b_base = 0u;
#include matmul_cooperative_load
#include matmul_cooperative_stage
  }
  workgroupBarrier();
  for (var step = begin; step < end; step++) {
    {
      // What comes after the last step is read, and never multiplied.
      let k0 = min(step + 1u, end - 1u) * BK;
#include matmul_cooperative_load
    }
    let odd = (step - begin) & 1u;
    {
      let a_base = odd * A_SIZE;
      let b_base = odd * B_SIZE;
#include matmul_cooperative_multiply
    }
    {
      let a_base = (1u - odd) * A_SIZE;
      let b_base = (1u - odd) * B_SIZE;
#include matmul_cooperative_stage
    }
    workgroupBarrier();
  }
#end
  let a_base = 0u;
  let b_base = 0u;
#if AHEAD
  {
    let k0 = begin * BK;
#include matmul_cooperative_load
  }
  for (var step = begin; step < end; step++) {
#include matmul_cooperative_stage
    workgroupBarrier();
    let k0 = min(step + 1u, end - 1u) * BK;
#include matmul_cooperative_load
#include matmul_cooperative_multiply
    workgroupBarrier();
  }
#end
#if PLAIN
  for (var step = begin; step < end; step++) {
    let k0 = step * BK;
#include matmul_cooperative_load
#include matmul_cooperative_stage
    workgroupBarrier();
#include matmul_cooperative_multiply
    workgroupBarrier();
  }
#end
#if SECOND
  for (var k0 = 0u; k0 < p.k2; k0 += BK) {
#for r SECOND_LOADS
    second_stage(thread + {r}u * THREADS, row0, column0, k0, extra);
#end
    workgroupBarrier();
#include matmul_cooperative_multiply
    workgroupBarrier();
  }
#end
  // Results go through workgroup memory, a fragment of each subgroup at a time, to be scaled and converted.
  let held = subgroup * 64u;
#for i FM
#for j FN
  {
    let o = held;
    let so = 4u;
    coopStoreT(c{i}_{j}, &staged[o], so);
    workgroupBarrier();
    for (var e = lane; e < 64u; e += 32u) {
      store4(row0 + sub_row + {i}u * 16u + e / 4u, column0 + sub_column + {j}u * 16u + (e % 4u) * 4u, staged[held + e],
             group.z);
    }
    workgroupBarrier();
  }
#end
#end
}
