// Attention of generation: row r stands at position start + r and sees all positions of the cache up to its own
// (window - 1 back at most). One row and one head a workgroup, from first_head on, whose keys and values are the first of the
// part of the cache that is bound; 64 keys at a time, one a thread.
var<workgroup> query: array<f32, HEAD_DIM>;
var<workgroup> score: array<f32, 64>;
var<workgroup> first_position: u32;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.x;
  let head = p.first_head + group.y;
  let kv = (group.y / p.group) * HEAD_DIM;
  if (thread == 0u) { first_position = u32(start_get(0u)); }
  let position = workgroupUniformLoad(&first_position) + row;
  for (var d = thread; d < HEAD_DIM; d += 64u) {
    query[d] = qkv_get(row * p.stride + head * HEAD_DIM + d) * p.scale;
  }
  workgroupBarrier();
  let end = min(position + 1u, p.capacity);
  var begin = 0u;
#if WINDOW
  if (position + 1u > p.window) { begin = position + 1u - p.window; }
#end
  var highest = -1e30;
  var total = 0.0;
#for c CHUNKS
  var o_{c} = 0.0;
#end
  for (var key0 = begin; key0 < end; key0 += 64u) {
    let key = key0 + thread;
    var s = -1e30;
    if (key < end) {
      s = 0.0;
      for (var d = 0u; d < HEAD_DIM; d++) { s += query[d] * cache_key_get(key * p.columns + kv + d); }
#if SOFTCAP
      s = p.softcap * tanh(clamp(s / p.softcap, -15.0, 15.0));
#end
    }
    score[thread] = s;
    workgroupBarrier();
    var top = highest;
    for (var i = 0u; i < 64u; i++) { top = max(top, score[i]); }
    workgroupBarrier();
    score[thread] = select(0.0, exp(s - top), key < end);
    workgroupBarrier();
    let shrink = exp(highest - top);
    highest = top;
    total *= shrink;
#for c CHUNKS
    o_{c} *= shrink;
#end
    let count = min(64u, end - key0);
    for (var i = 0u; i < count; i++) {
      let probability = score[i];
      total += probability;
#for c CHUNKS
      if ({c}u * 64u + thread < HEAD_DIM) { o_{c} += probability * cache_value_get((key0 + i) * p.columns + kv + {c}u * 64u + thread); }
#end
    }
    workgroupBarrier();
  }
#for c CHUNKS
  if ({c}u * 64u + thread < HEAD_DIM) { output_put(row * p.output_stride + head * HEAD_DIM + {c}u * 64u + thread, o_{c} / total); }
#end
}
