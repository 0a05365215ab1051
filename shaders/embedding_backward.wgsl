// grad_weight[ids[t]] += scale · grad_output[t], in the order of t: the workgroup of the first token with an id
// adds up all tokens that share it, so that no two write to the same row.
var<workgroup> earlier: array<u32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let token = group.x;
  let id = ids_get(token);
  let row = u32(id) - p.first;
  var found = 0u;
  if (row >= p.rows) { found = 1u; }
  for (var t = thread; t < token; t += 128u) {
    if (ids_get(t) == id) { found = 1u; }
  }
  earlier[thread] = found;
  workgroupBarrier();
  for (var half = 64u; half > 0u; half /= 2u) {
    if (thread < half) { earlier[thread] |= earlier[thread + half]; }
    workgroupBarrier();
  }
  if (earlier[0] != 0u) { return; }
  var factor = p.scale;
#if UNSCALE
  factor *= unscale_get(0u);
#end
  for (var column = thread; column < p.columns; column += 128u) {
    var sum = 0.0;
    for (var t = token; t < p.tokens; t++) {
      if (ids_get(t) == id) { sum += grad_output_get(t * p.columns + column); }
    }
    let at = row * p.columns + column;
    grad_weight_put(at, grad_weight_get(at) + factor * sum);
  }
}
