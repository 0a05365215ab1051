// Gradient of the queries: with P = exp(score - log_sum_exp) and dS = P ∘ (dO Vᵀ - delta), grad_q = scale · dS K
// (times the derivative of the soft cap). One tile of queries and one head a workgroup; scores are computed again.
#include attention_backward_tiles
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
#if RANGES
  let first = p.query_first + group.x * 32u;
#else
  let first = group.x * 32u;
#end
  let head = group.y;
  let kv_head = head / p.group;
  let y = thread / 16u;
  let x = thread % 16u;
  let row = first + 2u * y;
  let last_token = p.tokens - 1u;
  let row_a = min(row, last_token);
  let row_b = min(row + 1u, last_token);
  let lowest_a = lowest_key(row_a);
  let lowest_b = lowest_key(row_b);
  let lse = vec2<f32>(log_sum_exp_get(row_a * p.heads + head), log_sum_exp_get(row_b * p.heads + head));
  let mean = vec2<f32>(delta_get(row_a * p.heads + head), delta_get(row_b * p.heads + head));
  if (thread == 0u) { bound = lowest_a; }
#if RANGES
  let begin = max(workgroupUniformLoad(&bound) / 32u * 32u, p.key_first);
  let end = min(first + 32u, p.key_end);
#if MORE
  if (begin >= end) { return; }
#end
#else
  let begin = workgroupUniformLoad(&bound) / 32u * 32u;
  let end = min(first + 32u, p.tokens);
#end
#for c CHUNKS
  var o_a{c} = vec4<f32>();
  var o_b{c} = vec4<f32>();
#end
  for (var key0 = begin; key0 < end; key0 += 32u) {
    var s = vec4<f32>();
    for (var column = 0u; column < HEAD_DIM; column += 32u) {
      workgroupBarrier();
      stage[(thread / 8u) * 9u + thread % 8u] = query(first + thread / 8u, column + (thread % 8u) * 4u, head);
      stage[288u + (thread / 8u) * 9u + thread % 8u] = key(key0 + thread / 8u, column + (thread % 8u) * 4u, kv_head);
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
      stage[(thread / 8u) * 9u + thread % 8u] = grad(first + thread / 8u, column + (thread % 8u) * 4u, head);
      stage[288u + (thread / 8u) * 9u + thread % 8u] = value(key0 + thread / 8u, column + (thread % 8u) * 4u, kv_head);
      workgroupBarrier();
      g = add_products(g, x, y);
    }
    let column = key0 + x;
    let seen = vec4<bool>(column >= lowest_a && column <= row, column + 16u >= lowest_a && column + 16u <= row,
                          column >= lowest_b && column <= row + 1u, column + 16u >= lowest_b && column + 16u <= row + 1u);
    var d = exp(s - lse.xxyy) * (g - mean.xxyy) * p.scale;
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
    stage[thread] = key(key0 + thread / 16u, {c}u * 64u + x * 4u, kv_head);
    stage[thread + 256u] = key(key0 + 16u + thread / 16u, {c}u * 64u + x * 4u, kv_head);
    workgroupBarrier();
    for (var i = 0u; i < 32u; i++) {
      let r = stage[i * 16u + x];
      o_a{c} += score[y * 66u + i] * r;
      o_b{c} += score[y * 66u + 33u + i] * r;
    }
#end
  }
#for c CHUNKS
  put_four(row, {c}u * 64u + x * 4u, head * HEAD_DIM, o_a{c});
  put_four(row + 1u, {c}u * 64u + x * 4u, head * HEAD_DIM, o_b{c});
#end
}
