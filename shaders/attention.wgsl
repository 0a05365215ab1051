// output = softmax(mask(scale · Q Kᵀ)) V, one tile of queries and one head a workgroup, keys in tiles with a running
// maximum and sum (Dao 2023, arXiv 2307.08691): no score leaves the workgroup. Token t sees s when
// max(document_start[t], t - window + 1) <= s <= t. log_sum_exp is kept for the backward pass.
#include attention_tiles
#if MORE
// Adds `share` of the value to the rest of the one that is there.
fn put_more(row: u32, column: u32, head: u32, v: vec4<f32>, share: f32) {
  if (row >= p.tokens || column >= HEAD_DIM) { return; }
  let at = (row - p.query_first) * p.output_stride + head * HEAD_DIM + column;
#if RAGGED
#for i 4
  if (column + {i}u < HEAD_DIM) { output_put(at + {i}u, mix(output_get(at + {i}u), v[{i}], share)); }
#end
#else
  output_put4(at, mix(output_get4(at), v, share));
#end
}
#end
fn put(row: u32, column: u32, head: u32, v: vec4<f32>) {
  if (row >= p.tokens || column >= HEAD_DIM) { return; }
#if RANGES
  let at = (row - p.query_first) * p.output_stride + head * HEAD_DIM + column;
#else
  let at = row * p.output_stride + head * HEAD_DIM + column;
#end
#if RAGGED
  output_put(at, v.x);
  if (column + 1u < HEAD_DIM) { output_put(at + 1u, v.y); }
  if (column + 2u < HEAD_DIM) { output_put(at + 2u, v.z); }
  if (column + 3u < HEAD_DIM) { output_put(at + 3u, v.w); }
#else
  output_put4(at, v);
#end
}
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
  let lowest_a = lowest_key(min(row, last_token));
  let lowest_b = lowest_key(min(row + 1u, last_token));
  if (thread == 0u) { bound = lowest_a; }
#if RANGES
  let begin = max(workgroupUniformLoad(&bound) / 32u * 32u, p.key_first);
  let end = min(first + 32u, p.key_end);
#else
  let begin = workgroupUniformLoad(&bound) / 32u * 32u;
  let end = min(first + 32u, p.tokens);
#end
#if MORE
  if (begin >= end) { return; }
  let row_a = min(row, last_token);
  let row_b = min(row + 1u, last_token);
  let before = vec2<f32>(log_sum_exp_get(row_a * p.heads + head), log_sum_exp_get(row_b * p.heads + head));
  storageBarrier();
#end
  var highest = vec2<f32>(-1e30);
  var total = vec2<f32>();
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
    let column = key0 + x;
    let seen = vec4<bool>(column >= lowest_a && column <= row, column + 16u >= lowest_a && column + 16u <= row,
                          column >= lowest_b && column <= row + 1u, column + 16u >= lowest_b && column + 16u <= row + 1u);
    s = select(vec4<f32>(-1e30), s, seen);
    workgroupBarrier();
    score[y * 66u + x] = s.x;
    score[y * 66u + x + 16u] = s.y;
    score[y * 66u + 33u + x] = s.z;
    score[y * 66u + 33u + x + 16u] = s.w;
    workgroupBarrier();
    var top = highest;
    for (var i = 0u; i < 32u; i++) {
      top = max(top, vec2<f32>(score[y * 66u + i], score[y * 66u + 33u + i]));
    }
    let shrink = exp(highest - top);
    highest = top;
    s = select(vec4<f32>(), exp(s - top.xxyy), seen);
    workgroupBarrier();
    score[y * 66u + x] = s.x;
    score[y * 66u + x + 16u] = s.y;
    score[y * 66u + 33u + x] = s.z;
    score[y * 66u + 33u + x + 16u] = s.w;
    workgroupBarrier();
    total *= shrink;
    for (var i = 0u; i < 32u; i++) {
      total += vec2<f32>(score[y * 66u + i], score[y * 66u + 33u + i]);
    }
#for c CHUNKS
    o_a{c} *= shrink.x;
    o_b{c} *= shrink.y;
#end
#for c CHUNKS
    workgroupBarrier();
    stage[thread] = value(key0 + thread / 16u, {c}u * 64u + x * 4u, kv_head);
    stage[thread + 256u] = value(key0 + 16u + thread / 16u, {c}u * 64u + x * 4u, kv_head);
    workgroupBarrier();
    for (var i = 0u; i < 32u; i++) {
      let r = stage[i * 16u + x];
      o_a{c} += score[y * 66u + i] * r;
      o_b{c} += score[y * 66u + 33u + i] * r;
    }
#end
  }
#if MORE
  // Both results by their sums of exponentials. A row that sees none of these keys stays as it is.
  let some = total > vec2<f32>();
  let lse = highest + log(total);
  let share = select(vec2<f32>(), 1.0 / (1.0 + exp(before - lse)), some);
  total = select(vec2<f32>(1.0), total, some);
#for c CHUNKS
  put_more(row, {c}u * 64u + x * 4u, head, o_a{c} / total.x, share.x);
  put_more(row + 1u, {c}u * 64u + x * 4u, head, o_b{c} / total.y, share.y);
#end
  let top = max(before, lse);
  let both = select(before, top + log(exp(before - top) + exp(lse - top)), some);
  if (x == 0u && row < p.tokens) { log_sum_exp_put(row * p.heads + head, both.x); }
  if (x == 0u && row + 1u < p.tokens) { log_sum_exp_put((row + 1u) * p.heads + head, both.y); }
#else
#for c CHUNKS
  put(row, {c}u * 64u + x * 4u, head, o_a{c} / total.x);
  put(row + 1u, {c}u * 64u + x * 4u, head, o_b{c} / total.y);
#end
  if (x == 0u && row < p.tokens) { log_sum_exp_put(row * p.heads + head, highest.x + log(total.x)); }
  if (x == 0u && row + 1u < p.tokens) { log_sum_exp_put((row + 1u) * p.heads + head, highest.y + log(total.y)); }
#end
}
