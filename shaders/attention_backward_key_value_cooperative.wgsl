// attention_backward_key_value.wgsl on cooperative matrices: four subgroups take 16 keys each; queries and gradients of
// the output come 32 at a time, head after head of those that share the keys (see attention_cooperative.wgsl).
//   AHEAD  the next queries are on their way through registers, and a fragment of keys or values is read once a tile
#include attention_mask
const D4: u32 = HEAD_DIM / 4u;
const PITCH: u32 = D4 + 2u;
var<workgroup> query_tile: array<vec4<f16>, 32u * PITCH>;
var<workgroup> output_tile: array<vec4<f16>, 32u * PITCH>;
// [64 keys, 32 queries]: scores, and value · grad_outputᵀ.
var<workgroup> score_tile: array<vec4<f32>, 576>;
var<workgroup> grad_tile: array<vec4<f32>, 576>;
var<workgroup> probability_tile: array<vec4<f16>, 640>;
// Of the tile's queries: log_sum_exp, delta, lowest key.
var<workgroup> lse_row: array<vec4<f32>, 8>;
var<workgroup> mean_row: array<vec4<f32>, 8>;
var<workgroup> lowest_row: array<vec4<u32>, 8>;
// Whole sixteens of bytes, as every array here: fragments are read from addresses rounded down to them, and a lone
// word may leave the tile that follows it between two.
var<workgroup> flags: array<u32, 4>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {
  let first = group.x * 64u;
  let kv_head = group.y;
  let stride4 = p.stride / 4u;
  let output4 = p.output_stride / 4u;
  let row = subgroup * 16u + lane / 2u;
  let half = lane % 2u;
  let key = first + row;
  if (thread == 0u) {
    flags[0] = u32(document_end_get(first + 63u));
#if WINDOW
    flags[0] = min(flags[0], first + 63u + p.window);
#end
  }
  let end = min(workgroupUniformLoad(&flags[0]), p.tokens);
#for d FRAGMENTS
  var k{d} = coop_mat16x16<f32, C>();
  var v{d} = coop_mat16x16<f32, C>();
#end
#if AHEAD
#for r LOADS
  let slot{r} = (thread + {r}u * 128u) / D4 * PITCH + (thread + {r}u * 128u) % D4;
  let from{r} = (thread + {r}u * 128u) / D4;
  let column{r}4 = (thread + {r}u * 128u) % D4;
  var next_query{r} = qkv[(first + from{r}) * stride4 + kv_head * p.group * D4 + column{r}4];
  var next_output{r} = grad_output[(first + from{r}) * output4 + kv_head * p.group * D4 + column{r}4];
#end
  let turn = thread % 32u;
  var next_lse = log_sum_exp_get((first + turn) * p.heads + kv_head * p.group);
  var next_mean = delta_get((first + turn) * p.heads + kv_head * p.group);
  var next_lowest = lowest_key(first + turn);
#end
  for (var head = kv_head * p.group; head < (kv_head + 1u) * p.group; head++) {
    for (var query0 = first; query0 < end; query0 += 32u) {
#if AHEAD
#for r LOADS
      query_tile[slot{r}] = next_query{r};
      output_tile[slot{r}] = next_output{r};
#end
      if (thread < 32u) {
        lse_row[turn / 4u][turn % 4u] = next_lse;
        mean_row[turn / 4u][turn % 4u] = next_mean;
        lowest_row[turn / 4u][turn % 4u] = next_lowest;
      }
      workgroupBarrier();
      {
        // The next tile; after the last one, some tile that is not used.
        let more = query0 + 32u < end;
        let row0 = select(first, query0 + 32u, more);
        let next_head = min(select(head + 1u, head, more), p.heads - 1u);
#for r LOADS
        next_query{r} = qkv[(row0 + from{r}) * stride4 + next_head * D4 + column{r}4];
        next_output{r} = grad_output[(row0 + from{r}) * output4 + next_head * D4 + column{r}4];
#end
        next_lse = log_sum_exp_get((row0 + turn) * p.heads + next_head);
        next_mean = delta_get((row0 + turn) * p.heads + next_head);
        next_lowest = lowest_key(row0 + turn);
      }
      {
#for n 2
        var s{n} = coop_mat16x16<f32, C>();
        var t{n} = coop_mat16x16<f32, C>();
#end
#for d FRAGMENTS
        {
          let ia = (first + subgroup * 16u) * stride4 + (p.key_start + kv_head * HEAD_DIM) / 4u + {d}u * 4u;
          let pa = stride4;
          let keys = coopLoadT<coop_mat16x16<f16, A>>(&qkv[ia], pa);
          let ib = (first + subgroup * 16u) * stride4 + (p.value_start + kv_head * HEAD_DIM) / 4u + {d}u * 4u;
          let pb = stride4;
          let values = coopLoadT<coop_mat16x16<f16, A>>(&qkv[ib], pb);
#for n 2
          let i{n} = {n}u * 16u * PITCH + {d}u * 4u;
          let p{n} = PITCH;
          let q{n} = coopLoad<coop_mat16x16<f16, B>>(&query_tile[i{n}], p{n});
          s{n} = coopMultiplyAdd(keys, q{n}, s{n});
          let j{n} = {n}u * 16u * PITCH + {d}u * 4u;
          let o{n} = PITCH;
          let g{n} = coopLoad<coop_mat16x16<f16, B>>(&output_tile[j{n}], o{n});
          t{n} = coopMultiplyAdd(values, g{n}, t{n});
#end
        }
#end
#for n 2
        let is{n} = subgroup * 144u + {n}u * 4u;
        let ps{n} = 9u;
        coopStoreT(s{n}, &score_tile[is{n}], ps{n});
        let it{n} = subgroup * 144u + {n}u * 4u;
        let pt{n} = 9u;
        coopStoreT(t{n}, &grad_tile[it{n}], pt{n});
#end
      }
#else
#for r LOADS
      {
        let i = thread + {r}u * 128u;
        let slot = i / D4 * PITCH + i % D4;
        query_tile[slot] = qkv[(query0 + i / D4) * stride4 + head * D4 + i % D4];
        output_tile[slot] = grad_output[(query0 + i / D4) * output4 + head * D4 + i % D4];
      }
#end
      if (thread < 8u) {
        let at = query0 + thread * 4u;
#for v 4
        lse_row[thread][{v}] = log_sum_exp_get((at + {v}u) * p.heads + head);
        mean_row[thread][{v}] = delta_get((at + {v}u) * p.heads + head);
        lowest_row[thread][{v}] = lowest_key(at + {v}u);
#end
      }
      workgroupBarrier();
#for n 2
      {
        var s = coop_mat16x16<f32, C>();
        var t = coop_mat16x16<f32, C>();
#for d FRAGMENTS
        {
          let ia = (first + subgroup * 16u) * stride4 + (p.key_start + kv_head * HEAD_DIM) / 4u + {d}u * 4u;
          let pa = stride4;
          let keys = coopLoadT<coop_mat16x16<f16, A>>(&qkv[ia], pa);
          let i0 = {n}u * 16u * PITCH + {d}u * 4u;
          let p0 = PITCH;
          let q = coopLoad<coop_mat16x16<f16, B>>(&query_tile[i0], p0);
          s = coopMultiplyAdd(keys, q, s);
          let ib = (first + subgroup * 16u) * stride4 + (p.value_start + kv_head * HEAD_DIM) / 4u + {d}u * 4u;
          let pb = stride4;
          let values = coopLoadT<coop_mat16x16<f16, A>>(&qkv[ib], pb);
          let i1 = {n}u * 16u * PITCH + {d}u * 4u;
          let p1 = PITCH;
          let g = coopLoad<coop_mat16x16<f16, B>>(&output_tile[i1], p1);
          t = coopMultiplyAdd(values, g, t);
        }
#end
        let i2 = subgroup * 144u + {n}u * 4u;
        let p2 = 9u;
        coopStoreT(s, &score_tile[i2], p2);
        let i3 = subgroup * 144u + {n}u * 4u;
        let p3 = 9u;
        coopStoreT(t, &grad_tile[i3], p3);
      }
#end
#end
      workgroupBarrier();
#for v 4
      let column{v} = half * 4u + {v}u;
      let at{v} = vec4<u32>(query0 + column{v} * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
      let seen{v} = (lowest_row[column{v}] <= vec4<u32>(key)) & (at{v} >= vec4<u32>(key));
      let x{v} = capped(score_tile[row * 9u + column{v}]);
      let y{v} = select(vec4<f32>(), exp(min(x{v} - lse_row[column{v}], vec4<f32>(0.0))), seen{v});
      probability_tile[row * 10u + column{v}] = vec4<f16>(y{v});
#end
      workgroupBarrier();
#for q 2
      {
        let ip = subgroup * 160u + {q}u * 4u;
        let pp = 10u;
        let probability = coopLoadT<coop_mat16x16<f16, A>>(&probability_tile[ip], pp);
#for d FRAGMENTS
        {
          let ig = {q}u * 16u * PITCH + {d}u * 4u;
          let pg = PITCH;
          let gradient = coopLoadT<coop_mat16x16<f16, B>>(&output_tile[ig], pg);
          v{d} = coopMultiplyAdd(probability, gradient, v{d});
        }
#end
      }
#end
      workgroupBarrier();
#for v 4
      {
        var d = y{v} * (grad_tile[row * 9u + column{v}] - mean_row[column{v}]) * p.scale;
#if SOFTCAP
        d *= 1.0 - (x{v} / p.softcap) * (x{v} / p.softcap);
#end
        probability_tile[row * 10u + column{v}] = vec4<f16>(d);
      }
#end
      workgroupBarrier();
#for q 2
      {
        let ip = subgroup * 160u + {q}u * 4u;
        let pp = 10u;
        let gradient = coopLoadT<coop_mat16x16<f16, A>>(&probability_tile[ip], pp);
#for d FRAGMENTS
        {
          let iq = {q}u * 16u * PITCH + {d}u * 4u;
          let pq = PITCH;
          let query = coopLoadT<coop_mat16x16<f16, B>>(&query_tile[iq], pq);
          k{d} = coopMultiplyAdd(gradient, query, k{d});
        }
#end
      }
#end
      workgroupBarrier();
    }
  }
#for d FRAGMENTS
  {
    let io = subgroup * 144u;
    let po = 9u;
    coopStoreT(k{d}, &score_tile[io], po);
    let jo = subgroup * 144u;
    let qo = 9u;
    coopStoreT(v{d}, &grad_tile[jo], qo);
    workgroupBarrier();
    let at = key * p.stride + kv_head * HEAD_DIM + {d}u * 16u + half * 8u;
    grad_qkv_put4(at + p.key_start, score_tile[row * 9u + half * 2u]);
    grad_qkv_put4(at + p.key_start + 4u, score_tile[row * 9u + half * 2u + 1u]);
    grad_qkv_put4(at + p.value_start, grad_tile[row * 9u + half * 2u]);
    grad_qkv_put4(at + p.value_start + 4u, grad_tile[row * 9u + half * 2u + 1u]);
    workgroupBarrier();
  }
#end
}
