// output = activation(gate) · up. SILU: x · sigmoid(x); else 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
fn activation(x: f32) -> f32 {
#if SILU
  return x / (1.0 + exp(-x));
#else
  return 0.5 * x * (1.0 + tanh(clamp(0.7978845608028654 * (x + 0.044715 * x * x * x), -15.0, 15.0)));
#end
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.y;
  let column = (group.x * 256u + thread) * WIDTH;
  if (column >= p.columns) { return; }
  let gate = row * 2u * p.columns + column;
#if VECTOR
  let g = gate_up_get4(gate);
  let u = gate_up_get4(gate + p.columns);
  output_put4(row * p.columns + column, vec4<f32>(activation(g.x), activation(g.y), activation(g.z), activation(g.w)) * u);
#else
  output_put(row * p.columns + column, activation(gate_up_get(gate)) * gate_up_get(gate + p.columns));
#end
}
