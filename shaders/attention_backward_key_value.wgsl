// Gradients of keys and values: grad_v = Pᵀ dO, grad_k = scale · dSᵀ Q, with P and dS as in attention_backward_query.
// One tile of keys and one key-value head a workgroup; it goes through the query heads that share it, in order.
#include attention_backward_tiles
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
#if RANGES
  let first = p.key_first + group.x * 32u;
#else
  let first = group.x * 32u;
#end
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
#if RANGES
  let begin = max(first, p.query_first);
  let end = min(workgroupUniformLoad(&bound), p.query_end);
#if MORE
  if (begin >= end) { return; }
#end
#else
  let end = min(workgroupUniformLoad(&bound), p.tokens);
#end
#for c CHUNKS
  var o_a{c} = vec4<f32>();
  var o_b{c} = vec4<f32>();
  var v_a{c} = vec4<f32>();
  var v_b{c} = vec4<f32>();
#end
  for (var head = kv_head * p.group; head < (kv_head + 1u) * p.group; head++) {
#if RANGES
  for (var query0 = begin; query0 < end; query0 += 32u) {
#else
  for (var query0 = first; query0 < end; query0 += 32u) {
#end
    var s = vec4<f32>();
    for (var column = 0u; column < HEAD_DIM; column += 32u) {
      workgroupBarrier();
      stage[(thread / 8u) * 9u + thread % 8u] = key(first + thread / 8u, column + (thread % 8u) * 4u, kv_head);
      stage[288u + (thread / 8u) * 9u + thread % 8u] = query(query0 + thread / 8u, column + (thread % 8u) * 4u, head);
      workgroupBarrier();
      s = add_products(s, x, y);
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
      g = add_products(g, x, y);
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
  put_four(row, {c}u * 64u + x * 4u, p.key_start + kv_head * HEAD_DIM, o_a{c});
  put_four(row + 1u, {c}u * 64u + x * 4u, p.key_start + kv_head * HEAD_DIM, o_b{c});
  put_four(row, {c}u * 64u + x * 4u, p.value_start + kv_head * HEAD_DIM, v_a{c});
  put_four(row + 1u, {c}u * 64u + x * 4u, p.value_start + kv_head * HEAD_DIM, v_b{c});
#end
}
