// Gradients of keys and values: grad_v = Pᵀ dO, grad_k = scale · dSᵀ Q, with P and dS as in attention_backward_query.
// One tile of keys and one key-value head a workgroup; it goes through the query heads that share it, in order.
// Tiles are 32 rows. Thread (y, x) of 16 x 16 owns rows 2y and 2y+1: of a 32x32 product columns x and x+16, of a
// 32 x HEAD_DIM product elements 4x..4x+4 of each 64 columns.
// 32 columns of a left tile (rows 9 vec4 apart, against bank conflicts) and of a right one, or 64 of one tile.
var<workgroup> stage: array<vec4<f32>, 576>;
var<workgroup> score: array<f32, 1056>;
var<workgroup> bound: u32;
// Lowest token that `query` sees.
fn lowest_key(query: u32) -> u32 {
  var lowest = u32(document_start_get(query));
#if WINDOW
  if (query + 1u > p.window) { lowest = max(lowest, query + 1u - p.window); }
#end
  return lowest;
}
fn query(row: u32, column: u32, head: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
  let at = row * p.stride + head * HEAD_DIM + column;
#if RAGGED
  var value = vec4<f32>(qkv_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { value.y = qkv_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { value.z = qkv_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { value.w = qkv_get(at + 3u); }
  return value;
#else
  return qkv_get4(at);
#end
}
fn key(row: u32, column: u32, head: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
  let at = row * p.stride + p.key_start + head * HEAD_DIM + column;
#if RAGGED
  var value = vec4<f32>(qkv_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { value.y = qkv_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { value.z = qkv_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { value.w = qkv_get(at + 3u); }
  return value;
#else
  return qkv_get4(at);
#end
}
fn value(row: u32, column: u32, head: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
  let at = row * p.stride + p.value_start + head * HEAD_DIM + column;
#if RAGGED
  var value = vec4<f32>(qkv_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { value.y = qkv_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { value.z = qkv_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { value.w = qkv_get(at + 3u); }
  return value;
#else
  return qkv_get4(at);
#end
}
fn grad(row: u32, column: u32, head: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
  let at = row * p.output_stride + head * HEAD_DIM + column;
#if RAGGED
  var value = vec4<f32>(grad_output_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { value.y = grad_output_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { value.z = grad_output_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { value.w = grad_output_get(at + 3u); }
  return value;
#else
  return grad_output_get4(at);
#end
}
fn put_key(row: u32, column: u32, head: u32, v: vec4<f32>) {
  if (row >= p.tokens || column >= HEAD_DIM) { return; }
  let at = row * p.stride + p.key_start + head * HEAD_DIM + column;
#if RAGGED
  grad_qkv_put(at, v.x);
  if (column + 1u < HEAD_DIM) { grad_qkv_put(at + 1u, v.y); }
  if (column + 2u < HEAD_DIM) { grad_qkv_put(at + 2u, v.z); }
  if (column + 3u < HEAD_DIM) { grad_qkv_put(at + 3u, v.w); }
#else
  grad_qkv_put4(at, v);
#end
}
fn put_value(row: u32, column: u32, head: u32, v: vec4<f32>) {
  if (row >= p.tokens || column >= HEAD_DIM) { return; }
  let at = row * p.stride + p.value_start + head * HEAD_DIM + column;
#if RAGGED
  grad_qkv_put(at, v.x);
  if (column + 1u < HEAD_DIM) { grad_qkv_put(at + 1u, v.y); }
  if (column + 2u < HEAD_DIM) { grad_qkv_put(at + 2u, v.z); }
  if (column + 3u < HEAD_DIM) { grad_qkv_put(at + 3u, v.w); }
#else
  grad_qkv_put4(at, v);
#end
}
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 32u;
  let kv_head = group.y;
  let y = thread / 16u;
  let x = thread % 16u;
  let row = first + 2u * y;
  let last_token = p.tokens - 1u;
  if (thread == 0u) {
    let last_key = min(first + 31u, last_token);
    bound = u32(document_end_get(last_key));
#if WINDOW
    bound = min(bound, last_key + p.window);
#end
  }
  let end = min(workgroupUniformLoad(&bound), p.tokens);
#for c CHUNKS
  var o_a{c} = vec4<f32>();
  var o_b{c} = vec4<f32>();
  var v_a{c} = vec4<f32>();
  var v_b{c} = vec4<f32>();
#end
  for (var head = kv_head * p.group; head < (kv_head + 1u) * p.group; head++) {
  for (var query0 = first; query0 < end; query0 += 32u) {
    var s = vec4<f32>();
    for (var column = 0u; column < HEAD_DIM; column += 32u) {
      workgroupBarrier();
      stage[(thread / 8u) * 9u + thread % 8u] = key(first + thread / 8u, column + (thread % 8u) * 4u, kv_head);
      stage[288u + (thread / 8u) * 9u + thread % 8u] = query(query0 + thread / 8u, column + (thread % 8u) * 4u, head);
      workgroupBarrier();
#for j 8
      {
        let a = stage[y * 18u + {j}u];
        let b = stage[y * 18u + 9u + {j}u];
        let c = stage[288u + x * 9u + {j}u];
        let d = stage[432u + x * 9u + {j}u];
        s += vec4<f32>(dot(a, c), dot(a, d), dot(b, c), dot(b, d));
      }
#end
    }
    s *= p.scale;
#if SOFTCAP
    s = p.softcap * tanh(clamp(s / p.softcap, vec4<f32>(-15.0), vec4<f32>(15.0)));
#end
    var g = vec4<f32>();
    for (var column = 0u; column < HEAD_DIM; column += 32u) {
      workgroupBarrier();
      stage[(thread / 8u) * 9u + thread % 8u] = value(first + thread / 8u, column + (thread % 8u) * 4u, kv_head);
      stage[288u + (thread / 8u) * 9u + thread % 8u] = grad(query0 + thread / 8u, column + (thread % 8u) * 4u, head);
      workgroupBarrier();
#for j 8
      {
        let a = stage[y * 18u + {j}u];
        let b = stage[y * 18u + 9u + {j}u];
        let c = stage[288u + x * 9u + {j}u];
        let d = stage[432u + x * 9u + {j}u];
        g += vec4<f32>(dot(a, c), dot(a, d), dot(b, c), dot(b, d));
      }
#end
    }
    let query_c = query0 + x;
    let query_d = query_c + 16u;
    let at_c = min(query_c, last_token);
    let at_d = min(query_d, last_token);
    let lowest_c = lowest_key(at_c);
    let lowest_d = lowest_key(at_d);
    let lse = vec2<f32>(log_sum_exp_get(at_c * p.heads + head), log_sum_exp_get(at_d * p.heads + head));
    let mean = vec2<f32>(delta_get(at_c * p.heads + head), delta_get(at_d * p.heads + head));
    let seen = vec4<bool>(row >= lowest_c && row <= query_c && (query_c < p.tokens), row >= lowest_d && row <= query_d && (query_d < p.tokens),
                          row + 1u >= lowest_c && row + 1u <= query_c && (query_c < p.tokens), row + 1u >= lowest_d && row + 1u <= query_d && (query_d < p.tokens));
    let probability = select(vec4<f32>(), exp(s - lse.xyxy), seen);
    workgroupBarrier();
    score[y * 66u + x] = probability.x;
    score[y * 66u + x + 16u] = probability.y;
    score[y * 66u + 33u + x] = probability.z;
    score[y * 66u + 33u + x + 16u] = probability.w;
#for c CHUNKS
    workgroupBarrier();
    stage[thread] = grad(query0 + thread / 16u, {c}u * 64u + x * 4u, head);
    stage[thread + 256u] = grad(query0 + 16u + thread / 16u, {c}u * 64u + x * 4u, head);
    workgroupBarrier();
    for (var i = 0u; i < 32u; i++) {
      let r = stage[i * 16u + x];
      v_a{c} += score[y * 66u + i] * r;
      v_b{c} += score[y * 66u + 33u + i] * r;
    }
#end
    var d = probability * (g - mean.xyxy) * p.scale;
#if SOFTCAP
    d *= 1.0 - (s / p.softcap) * (s / p.softcap);
#end
    d = select(vec4<f32>(), d, seen);
    workgroupBarrier();
    score[y * 66u + x] = d.x;
    score[y * 66u + x + 16u] = d.y;
    score[y * 66u + 33u + x] = d.z;
    score[y * 66u + 33u + x + 16u] = d.w;
#for c CHUNKS
    workgroupBarrier();
    stage[thread] = query(query0 + thread / 16u, {c}u * 64u + x * 4u, head);
    stage[thread + 256u] = query(query0 + 16u + thread / 16u, {c}u * 64u + x * 4u, head);
    workgroupBarrier();
    for (var i = 0u; i < 32u; i++) {
      let r = stage[i * 16u + x];
      o_a{c} += score[y * 66u + i] * r;
      o_b{c} += score[y * 66u + 33u + i] * r;
    }
#end
  }
  }
#for c CHUNKS
  put_key(row, {c}u * 64u + x * 4u, kv_head, o_a{c});
  put_key(row + 1u, {c}u * 64u + x * 4u, kv_head, o_b{c});
  put_value(row, {c}u * 64u + x * 4u, kv_head, v_a{c});
  put_value(row + 1u, {c}u * 64u + x * 4u, kv_head, v_b{c});
#end
}
