// delta[t, head] = Σ_d grad_output · output, which is Σ_s P · dP of the softmax's backward pass.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let index = group.x * 64u + thread;
  if (index >= p.count) { return; }
  let base = index * p.head_dim;
  var sum = 0.0;
  for (var i = 0u; i < p.head_dim; i++) { sum += grad_output_get(base + i) * output_get(base + i); }
  delta_put(index, sum);
}
