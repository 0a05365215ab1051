// matmul.wgsl on cooperative matrices: C = alpha · op(A) · op(B) + bias (+ C), f16 times f16 summed in f32 (for what
// A_BY_K, B_BY_K, SECOND, SEGMENTED and SPLIT mean see there).
//
// A tile of BM x BN belongs to SM x SN subgroups of 32 threads, each with FM x FN fragments of 16 x 16. Tiles keep
// the order in which their matrix is stored, rows padded by 8 halves against bank conflicts; what changes is how a
// fragment is read: coopLoadT takes rows, coopLoad columns.
//   DOUBLE  two tiles of each operand: while one is multiplied the next is on its way through registers, one barrier a
//           step; AHEAD  one tile, and the next through registers; neither: one tile, read when it is wanted
const THREADS: u32 = SM * SN * 32u;
alias Cell = vec4<f16>;
const CELL: u32 = 4u;
#if A_BY_K
const A_PITCH: u32 = (BK + 8u) / CELL;
const A_SIZE: u32 = BM * A_PITCH;
#else
const A_PITCH: u32 = (BM + 8u) / CELL;
const A_SIZE: u32 = BK * A_PITCH;
#end
#if B_BY_K
const B_PITCH: u32 = (BK + 8u) / CELL;
const B_SIZE: u32 = BN * B_PITCH;
#else
const B_PITCH: u32 = (BN + 8u) / CELL;
const B_SIZE: u32 = BK * B_PITCH;
#end
#if DOUBLE
var<workgroup> tile_a: array<Cell, A_SIZE * 2u>;
var<workgroup> tile_b: array<Cell, B_SIZE * 2u>;
#else
var<workgroup> tile_a: array<Cell, A_SIZE>;
var<workgroup> tile_b: array<Cell, B_SIZE>;
#end
var<workgroup> staged: array<f32, 256u * SM * SN>;

#if SEGMENTED
fn segment(index: u32) -> u32 {
  return p.rank * (select(0u, 1u, index >= p.segment1) + select(0u, 1u, index >= p.segment2) + select(0u, 1u, index >= p.segment3));
}
#end

// A cell of A's tile: number `i` of the tile in the order of storage.
fn a_load(i: u32, row0: u32, k0: u32) -> Cell {
#if A_BY_K
  let row = min(row0 + i / (BK / CELL), p.m - 1u);
  let k = k0 + (i % (BK / CELL)) * CELL;
#if !EXACT
  if (k >= p.k) { return Cell(); }
#end
  return a_get4h(row * p.a_stride + p.a_start + k);
#else
  let k = k0 + i / (BM / CELL);
  let row = min(row0 + (i % (BM / CELL)) * CELL, p.m - CELL);
#if !EXACT
  if (k >= p.k) { return Cell(); }
#end
  return a_get4h(k * p.a_stride + p.a_start + row);
#end
}

fn b_load(i: u32, column0: u32, k0: u32, extra: u32) -> Cell {
#if B_BY_K
  let column = min(column0 + i / (BK / CELL), p.n - 1u);
  let k = k0 + (i % (BK / CELL)) * CELL;
#if !EXACT
  if (k >= p.k) { return Cell(); }
#end
  return b_get4h(column * p.b_stride + p.b_start + k);
#else
  let k = k0 + i / (BN / CELL);
  let column = min(column0 + (i % (BN / CELL)) * CELL, p.n - CELL);
#if !EXACT
  if (k >= p.k) { return Cell(); }
#end
  return b_get4h(k * p.b_stride + p.b_start + extra + column);
#end
}

#if SECOND
fn a2_load(i: u32, row0: u32, k0: u32, extra: u32) -> Cell {
  let row = min(row0 + i / (BK / CELL), p.m - 1u);
  let k = k0 + (i % (BK / CELL)) * CELL;
  if (k >= p.k2) { return Cell(); }
#if SCALE_SECOND
  return a2_get4h(row * p.a2_stride + p.a2_start + extra + k) * f16(scale_get(0u));
#else
  return a2_get4h(row * p.a2_stride + p.a2_start + extra + k);
#end
}
fn b2_load(i: u32, column0: u32, k0: u32) -> Cell {
#if B_BY_K
  let column = min(column0 + i / (BK / CELL), p.n - 1u);
  let k = k0 + (i % (BK / CELL)) * CELL;
  if (k >= p.k2) { return Cell(); }
  return b2_get4h(column * p.b2_stride + p.b2_start + k);
#else
  let k = k0 + i / (BN / CELL);
  let column = min(column0 + (i % (BN / CELL)) * CELL, p.n - CELL);
  if (k >= p.k2) { return Cell(); }
  return b2_get4h(k * p.b2_stride + p.b2_start + column);
#end
}
#end

#if A_BY_K
fn a_slot(i: u32) -> u32 { return (i / (BK / CELL)) * A_PITCH + i % (BK / CELL); }
#else
fn a_slot(i: u32) -> u32 { return (i / (BM / CELL)) * A_PITCH + i % (BM / CELL); }
#end
#if B_BY_K
fn b_slot(i: u32) -> u32 { return (i / (BK / CELL)) * B_PITCH + i % (BK / CELL); }
#else
fn b_slot(i: u32) -> u32 { return (i / (BN / CELL)) * B_PITCH + i % (BN / CELL); }
#end

fn store4(row: u32, column: u32, sum: vec4<f32>, layer: u32) {
  if (row >= p.m || column >= p.n) { return; }
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

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {
  let row0 = group.y * BM;
  let column0 = group.x * BN;
  let sub_row = (subgroup / SN) * (FM * 16u);
  let sub_column = (subgroup % SN) * (FN * 16u);
#for i FM
#for j FN
  var c{i}_{j} = coop_mat16x16<f32, C>();
#end
#end
  let first_steps = (p.k + BK - 1u) / BK;
#if SECOND
  var end = first_steps + (p.k2 + BK - 1u) / BK;
#else
  var end = first_steps;
#end
  var begin = 0u;
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
  var a_next{r} = a_load(thread + {r}u * THREADS, row0, begin * BK);
#end
#for r B_LOADS
  var b_next{r} = b_load(thread + {r}u * THREADS, column0, begin * BK, extra);
#end
#if DOUBLE
#for r A_LOADS
  tile_a[a_slot(thread + {r}u * THREADS)] = a_next{r};
#end
#for r B_LOADS
  tile_b[b_slot(thread + {r}u * THREADS)] = b_next{r};
#end
  workgroupBarrier();
#end
  for (var step = begin; step < end; step++) {
#if DOUBLE
    let odd = (step - begin) & 1u;
    let a_base = odd * A_SIZE;
    let b_base = odd * B_SIZE;
    let next = step + 1u;
    if (next < end) {
#if SECOND
      if (next >= first_steps) {
        let k0 = (next - first_steps) * BK;
#for r A_LOADS
        a_next{r} = a2_load(thread + {r}u * THREADS, row0, k0, extra);
#end
#for r B_LOADS
        b_next{r} = b2_load(thread + {r}u * THREADS, column0, k0);
#end
      } else {
#end
        let k0 = next * BK;
#for r A_LOADS
        a_next{r} = a_load(thread + {r}u * THREADS, row0, k0);
#end
#for r B_LOADS
        b_next{r} = b_load(thread + {r}u * THREADS, column0, k0, extra);
#end
#if SECOND
      }
#end
    }
#else
    let a_base = 0u;
    let b_base = 0u;
#if AHEAD
#for r A_LOADS
    tile_a[a_slot(thread + {r}u * THREADS)] = a_next{r};
#end
#for r B_LOADS
    tile_b[b_slot(thread + {r}u * THREADS)] = b_next{r};
#end
    workgroupBarrier();
    let next = step + 1u;
    if (next < end) {
#if SECOND
      if (next >= first_steps) {
        let k0 = (next - first_steps) * BK;
#for r A_LOADS
        a_next{r} = a2_load(thread + {r}u * THREADS, row0, k0, extra);
#end
#for r B_LOADS
        b_next{r} = b2_load(thread + {r}u * THREADS, column0, k0);
#end
      } else {
#end
        let k0 = next * BK;
#for r A_LOADS
        a_next{r} = a_load(thread + {r}u * THREADS, row0, k0);
#end
#for r B_LOADS
        b_next{r} = b_load(thread + {r}u * THREADS, column0, k0, extra);
#end
#if SECOND
      }
#end
    }
#else
    if (step > begin) {
      let next = step;
#if SECOND
      if (next >= first_steps) {
        let k0 = (next - first_steps) * BK;
#for r A_LOADS
        a_next{r} = a2_load(thread + {r}u * THREADS, row0, k0, extra);
#end
#for r B_LOADS
        b_next{r} = b2_load(thread + {r}u * THREADS, column0, k0);
#end
      } else {
#end
        let k0 = next * BK;
#for r A_LOADS
        a_next{r} = a_load(thread + {r}u * THREADS, row0, k0);
#end
#for r B_LOADS
        b_next{r} = b_load(thread + {r}u * THREADS, column0, k0, extra);
#end
#if SECOND
      }
#end
    }
#for r A_LOADS
    tile_a[a_slot(thread + {r}u * THREADS)] = a_next{r};
#end
#for r B_LOADS
    tile_b[b_slot(thread + {r}u * THREADS)] = b_next{r};
#end
    workgroupBarrier();
#end
#end
#for q K_FRAGMENTS
    {
#for i FM
#if A_BY_K
      let ia{i} = a_base + (sub_row + {i}u * 16u) * A_PITCH + {q}u * 16u / CELL;
      let sa{i} = A_PITCH;
      let a{i} = coopLoadT<coop_mat16x16<f16, A>>(&tile_a[ia{i}], sa{i});
#else
      let ia{i} = a_base + {q}u * 16u * A_PITCH + (sub_row + {i}u * 16u) / CELL;
      let sa{i} = A_PITCH;
      let a{i} = coopLoad<coop_mat16x16<f16, A>>(&tile_a[ia{i}], sa{i});
#end
#end
#for j FN
#if B_BY_K
      let ib{j} = b_base + (sub_column + {j}u * 16u) * B_PITCH + {q}u * 16u / CELL;
      let sb{j} = B_PITCH;
      let b{j} = coopLoad<coop_mat16x16<f16, B>>(&tile_b[ib{j}], sb{j});
#else
      let ib{j} = b_base + {q}u * 16u * B_PITCH + (sub_column + {j}u * 16u) / CELL;
      let sb{j} = B_PITCH;
      let b{j} = coopLoadT<coop_mat16x16<f16, B>>(&tile_b[ib{j}], sb{j});
#end
#end
#for i FM
#for j FN
      c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});
#end
#end
    }
#end
#if DOUBLE
    if (next < end) {
      let a_next_base = (1u - odd) * A_SIZE;
      let b_next_base = (1u - odd) * B_SIZE;
#for r A_LOADS
      tile_a[a_next_base + a_slot(thread + {r}u * THREADS)] = a_next{r};
#end
#for r B_LOADS
      tile_b[b_next_base + b_slot(thread + {r}u * THREADS)] = b_next{r};
#end
    }
#end
    workgroupBarrier();
  }
  // Results go through workgroup memory, a fragment of each subgroup at a time, to be scaled and converted.
  let out_base = subgroup * 256u;
#for i FM
#for j FN
  {
    let o = out_base;
    let so = 16u;
    coopStoreT(c{i}_{j}, &staged[o], so);
    workgroupBarrier();
    for (var e = lane; e < 64u; e += 32u) {
      let s = out_base + e * 4u;
      store4(row0 + sub_row + {i}u * 16u + e / 4u, column0 + sub_column + {j}u * 16u + (e % 4u) * 4u,
             vec4<f32>(staged[s], staged[s + 1u], staged[s + 2u], staged[s + 3u]), group.z);
    }
    workgroupBarrier();
  }
#end
#end
}
