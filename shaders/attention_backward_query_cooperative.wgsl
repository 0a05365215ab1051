// attention_backward_query.wgsl on cooperative matrices: four subgroups take 16 queries each; keys and values come 32 at
// a time (see attention_cooperative.wgsl).
#include attention_mask
const D4: u32 = HEAD_DIM / 4u;
const PITCH: u32 = D4 + 2u;
var<workgroup> key_tile: array<vec4<f16>, 32u * PITCH>;
var<workgroup> value_tile: array<vec4<f16>, 32u * PITCH>;
var<workgroup> score_tile: array<vec4<f32>, 576>;
// grad_output · valueᵀ, then the gradient of the scores as f16.
var<workgroup> grad_tile: array<vec4<f32>, 576>;
var<workgroup> probability_tile: array<vec4<f16>, 640>;
// Whole sixteens of bytes, as every array here: fragments are read from addresses rounded down to them, and a lone
// word may leave the tile that follows it between two.
var<workgroup> flags: array<u32, 4>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {
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
  let lse = log_sum_exp_get(query * p.heads + head);
  let mean = delta_get(query * p.heads + head);
  if (thread == 0u) { flags[0] = lowest_key(first); }
  let begin = workgroupUniformLoad(&flags[0]) / 32u * 32u;
  let end = first + 64u;
#for d FRAGMENTS
  let iq{d} = (first + subgroup * 16u) * stride4 + head * D4 + {d}u * 4u;
  let sq{d} = stride4;
  let q{d} = coopLoadT<coop_mat16x16<f16, A>>(&qkv[iq{d}], sq{d});
  let ig{d} = (first + subgroup * 16u) * (p.output_stride / 4u) + head * D4 + {d}u * 4u;
  let sg{d} = p.output_stride / 4u;
  let g{d} = coopLoadT<coop_mat16x16<f16, A>>(&grad_output[ig{d}], sg{d});
  var o{d} = coop_mat16x16<f32, C>();
#end
#for r LOADS
  let slot{r} = (thread + {r}u * 128u) / D4 * PITCH + (thread + {r}u * 128u) % D4;
  var next_key{r} = qkv[(begin + (thread + {r}u * 128u) / D4) * stride4 + key4 + (thread + {r}u * 128u) % D4];
  var next_value{r} = qkv[(begin + (thread + {r}u * 128u) / D4) * stride4 + value4 + (thread + {r}u * 128u) % D4];
#end
  for (var key0 = begin; key0 < end; key0 += 32u) {
#for r LOADS
    key_tile[slot{r}] = next_key{r};
    value_tile[slot{r}] = next_value{r};
#end
    workgroupBarrier();
    if (key0 + 32u < end) {
#for r LOADS
      next_key{r} = qkv[(key0 + 32u + (thread + {r}u * 128u) / D4) * stride4 + key4 + (thread + {r}u * 128u) % D4];
      next_value{r} = qkv[(key0 + 32u + (thread + {r}u * 128u) / D4) * stride4 + value4 + (thread + {r}u * 128u) % D4];
#end
    }
#for n 2
    {
      var s = coop_mat16x16<f32, C>();
      var t = coop_mat16x16<f32, C>();
#for d FRAGMENTS
      {
        let i0 = {n}u * 16u * PITCH + {d}u * 4u;
        let p0 = PITCH;
        let k = coopLoad<coop_mat16x16<f16, B>>(&key_tile[i0], p0);
        s = coopMultiplyAdd(q{d}, k, s);
        let i1 = {n}u * 16u * PITCH + {d}u * 4u;
        let p1 = PITCH;
        let v = coopLoad<coop_mat16x16<f16, B>>(&value_tile[i1], p1);
        t = coopMultiplyAdd(g{d}, v, t);
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
    workgroupBarrier();
#for v 4
    {
      let key = vec4<u32>(key0 + half * 16u + {v}u * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
      let seen = (key >= vec4<u32>(lowest)) & (key <= vec4<u32>(query));
      let x = capped(score_tile[row * 9u + half * 4u + {v}u]);
      var d = exp(min(x - lse, vec4<f32>(0.0))) * (grad_tile[row * 9u + half * 4u + {v}u] - mean) * p.scale;
#if SOFTCAP
      d *= 1.0 - (x / p.softcap) * (x / p.softcap);
#end
      probability_tile[row * 10u + half * 4u + {v}u] = vec4<f16>(select(vec4<f32>(), d, seen));
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
        let ik = {q}u * 16u * PITCH + {d}u * 4u;
        let pk = PITCH;
        let key = coopLoadT<coop_mat16x16<f16, B>>(&key_tile[ik], pk);
        o{d} = coopMultiplyAdd(gradient, key, o{d});
      }
#end
    }
#end
    workgroupBarrier();
  }
#for d FRAGMENTS
  {
    let io = subgroup * 144u;
    let po = 9u;
    coopStoreT(o{d}, &score_tile[io], po);
    workgroupBarrier();
    let at = query * p.stride + head * HEAD_DIM + {d}u * 16u + half * 8u;
    grad_qkv_put4(at, score_tile[row * 9u + half * 2u]);
    grad_qkv_put4(at + 4u, score_tile[row * 9u + half * 2u + 1u]);
    workgroupBarrier();
  }
#end
}
