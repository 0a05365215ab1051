// output[row, column] = alpha · Σ_layer parts[layer, row, column] (+ output), layers added in order.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let index = group.x * 256u + thread;
  if (index >= p.rows * p.columns) { return; }
  var sum = 0.0;
  for (var layer = 0u; layer < p.layers; layer++) {
    sum += parts_get(layer * p.rows * p.columns + index);
  }
  sum *= p.alpha;
#if SCALE
  sum *= scale_get(0u);
#end
#if UNSCALE
  sum *= unscale_get(0u);
#end
  let at = (index / p.columns) * p.stride + p.start + index % p.columns;
#if ACCUMULATE
  sum += output_get(at);
#end
  output_put(at, sum);
}
