// grad_gate = grad_output · up · activation'(gate); grad_up = grad_output · activation(gate).
// Returns (activation(x), activation'(x)).
fn activation(x: f32) -> vec2<f32> {
#if SILU
  let s = 1.0 / (1.0 + exp(-x));
  return vec2<f32>(x * s, s * (1.0 + x * (1.0 - s)));
#else
  let t = tanh(clamp(0.7978845608028654 * (x + 0.044715 * x * x * x), -15.0, 15.0));
  let slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x);
  return vec2<f32>(0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope);
#end
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.y;
  let column = (group.x * 256u + thread) * WIDTH;
  if (column >= p.columns) { return; }
  let gate = row * 2u * p.columns + column;
#if VECTOR
  let d = grad_output_get4(row * p.columns + column);
  let g = gate_up_get4(gate);
  let u = gate_up_get4(gate + p.columns);
  let a0 = activation(g.x); let a1 = activation(g.y); let a2 = activation(g.z); let a3 = activation(g.w);
  grad_gate_up_put4(gate, d * u * vec4<f32>(a0.y, a1.y, a2.y, a3.y));
  grad_gate_up_put4(gate + p.columns, d * vec4<f32>(a0.x, a1.x, a2.x, a3.x));
#else
  let d = grad_output_get(row * p.columns + column);
  let a = activation(gate_up_get(gate));
  grad_gate_up_put(gate, d * gate_up_get(gate + p.columns) * a.y);
  grad_gate_up_put(gate + p.columns, d * a.x);
#end
}
