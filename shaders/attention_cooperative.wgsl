// attention.wgsl on cooperative matrices: f16 products summed in f32, softmax in f32.
//
// Four subgroups of 32 threads take 16 queries each, with their queries and their part of the output in fragments; keys
// and values come 32 at a time through workgroup memory, the next ones on their way through registers. A score tile
// goes through workgroup memory once, where two threads share a row. The output is rescaled only when a row's maximum
// has grown by more than 8 (so that probabilities stay below e^8, well inside f16), which is rare after the first tile.
#include attention_mask
const D4: u32 = HEAD_DIM / 4u;
const PITCH: u32 = D4 + 2u;
var<workgroup> key_tile: array<vec4<f16>, 32u * PITCH>;
var<workgroup> value_tile: array<vec4<f16>, 32u * PITCH>;
// [64, 32], rows 9 vec4 apart.
var<workgroup> score_tile: array<vec4<f32>, 576>;
// [64, 32], rows 10 vec4 apart.
var<workgroup> probability_tile: array<vec4<f16>, 640>;
var<workgroup> shrink_row: array<f32, 64>;
// Whole sixteens of bytes, as every array here: fragments are read from addresses rounded down to them, and a lone
// word may leave the tile that follows it between two.
var<workgroup> flags: array<u32, 4>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {
  // The longest rows first: they end last.
  let first = (p.tiles - 1u - group.x) * 64u;
  let head = group.y;
  let kv_head = head / p.group;
  let stride4 = p.stride / 4u;
  let key4 = (p.key_start + kv_head * HEAD_DIM) / 4u;
  let value4 = (p.value_start + kv_head * HEAD_DIM) / 4u;
  let row = subgroup * 16u + lane / 2u;
  let half = lane % 2u;
  let query = first + row;
  let lowest = lowest_key(query);
  if (thread == 0u) {
    flags[0] = lowest_key(first);
    flags[1] = 0u;
  }
  let begin = workgroupUniformLoad(&flags[0]) / 32u * 32u;
  let end = first + 64u;
#for d FRAGMENTS
  let iq{d} = (first + subgroup * 16u) * stride4 + head * D4 + {d}u * 4u;
  let sq{d} = stride4;
  let q{d} = coopLoadT<coop_mat16x16<f16, A>>(&qkv[iq{d}], sq{d});
  var o{d} = coop_mat16x16<f32, C>();
#end
#for r LOADS
  let slot{r} = (thread + {r}u * 128u) / D4 * PITCH + (thread + {r}u * 128u) % D4;
  var next_key{r} = qkv[(begin + (thread + {r}u * 128u) / D4) * stride4 + key4 + (thread + {r}u * 128u) % D4];
  var next_value{r} = qkv[(begin + (thread + {r}u * 128u) / D4) * stride4 + value4 + (thread + {r}u * 128u) % D4];
#end
  var highest = -1e30;
  var total = 0.0;
  for (var key0 = begin; key0 < end; key0 += 32u) {
#for r LOADS
    key_tile[slot{r}] = next_key{r};
    value_tile[slot{r}] = next_value{r};
#end
    workgroupBarrier();
    if (thread == 0u) { flags[1] = 0u; }
    if (key0 + 32u < end) {
#for r LOADS
      next_key{r} = qkv[(key0 + 32u + (thread + {r}u * 128u) / D4) * stride4 + key4 + (thread + {r}u * 128u) % D4];
      next_value{r} = qkv[(key0 + 32u + (thread + {r}u * 128u) / D4) * stride4 + value4 + (thread + {r}u * 128u) % D4];
#end
    }
    var s0 = coop_mat16x16<f32, C>();
    var s1 = coop_mat16x16<f32, C>();
#for d FRAGMENTS
    {
      let i0 = {d}u * 4u;
      let p0 = PITCH;
      let k0 = coopLoad<coop_mat16x16<f16, B>>(&key_tile[i0], p0);
      s0 = coopMultiplyAdd(q{d}, k0, s0);
      let i1 = 16u * PITCH + {d}u * 4u;
      let p1 = PITCH;
      let k1 = coopLoad<coop_mat16x16<f16, B>>(&key_tile[i1], p1);
      s1 = coopMultiplyAdd(q{d}, k1, s1);
    }
#end
    let is0 = subgroup * 144u;
    let ps0 = 9u;
    coopStoreT(s0, &score_tile[is0], ps0);
    let is1 = subgroup * 144u + 4u;
    let ps1 = 9u;
    coopStoreT(s1, &score_tile[is1], ps1);
    workgroupBarrier();
    // Sixteen columns a thread.
    var top = -1e30;
#for v 4
    let at{v} = vec4<u32>(key0 + half * 16u + {v}u * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let seen{v} = (at{v} >= vec4<u32>(lowest)) & (at{v} <= vec4<u32>(query));
    let x{v} = select(vec4<f32>(-1e30), capped(score_tile[row * 9u + half * 4u + {v}u]), seen{v});
    top = max(top, max(max(x{v}.x, x{v}.y), max(x{v}.z, x{v}.w)));
#end
    top = max(top, subgroupShuffleXor(top, 1u));
    var shrink = 1.0;
    if (top > highest + 8.0) {
      shrink = exp(highest - top);
      // The first tile that a row sees finds nothing to shrink.
      if (highest > -1e29) { flags[1] = 1u; }
      highest = top;
      total *= shrink;
    }
    if (half == 0u) { shrink_row[row] = shrink; }
#for v 4
    let y{v} = select(vec4<f32>(), exp(x{v} - highest), seen{v});
    total += y{v}.x + y{v}.y + y{v}.z + y{v}.w;
    probability_tile[row * 10u + half * 4u + {v}u] = vec4<f16>(y{v});
#end
    if (workgroupUniformLoad(&flags[1]) != 0u) {
#for d FRAGMENTS
      {
        let io = subgroup * 144u;
        let po = 9u;
        coopStoreT(o{d}, &score_tile[io], po);
        workgroupBarrier();
        score_tile[row * 9u + half * 2u] *= shrink_row[row];
        score_tile[row * 9u + half * 2u + 1u] *= shrink_row[row];
        workgroupBarrier();
        let jo = subgroup * 144u;
        let qo = 9u;
        o{d} = coopLoadT<coop_mat16x16<f32, C>>(&score_tile[jo], qo);
        workgroupBarrier();
      }
#end
    }
#for q 2
    {
      let ip = subgroup * 160u + {q}u * 4u;
      let pp = 10u;
      let probability = coopLoadT<coop_mat16x16<f16, A>>(&probability_tile[ip], pp);
#for d FRAGMENTS
      {
        let iv = {q}u * 16u * PITCH + {d}u * 4u;
        let pv = PITCH;
        let value = coopLoadT<coop_mat16x16<f16, B>>(&value_tile[iv], pv);
        o{d} = coopMultiplyAdd(probability, value, o{d});
      }
#end
    }
#end
    workgroupBarrier();
  }
  total += subgroupShuffleXor(total, 1u);
  if (half == 0u) { log_sum_exp_put(query * p.heads + head, highest + log(total)); }
  let inverse = 1.0 / total;
#for d FRAGMENTS
  {
    let io = subgroup * 144u;
    let po = 9u;
    coopStoreT(o{d}, &score_tile[io], po);
    workgroupBarrier();
    let at = query * p.output_stride + head * HEAD_DIM + {d}u * 16u + half * 8u;
    output_put4(at, score_tile[row * 9u + half * 2u] * inverse);
    output_put4(at + 4u, score_tile[row * 9u + half * 2u + 1u] * inverse);
    workgroupBarrier();
  }
#end
}
