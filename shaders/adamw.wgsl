// AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101). g = gradient · c, c = min(1, max_grad_norm / (norm + 1e-6));
// p -= rate · weight_decay · p; m = β₁ m + (1 - β₁) g; v = β₂ v + (1 - β₂) g²;
// p -= rate / correction₁ · m / (√v / √correction₂ + epsilon). Nothing changes when the norm is not finite.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
  let norm = norm_get(0u);
  // By the bits: a compiler may take x == x for true. All exponent bits set means infinite or not a number.
  if ((bitcast<u32>(norm) & 0x7f800000u) == 0x7f800000u) { return; }
  var clip = 1.0;
  if (p.max_grad_norm > 0.0) { clip = min(1.0, p.max_grad_norm / (norm + 1e-6)); }
  let rate = hyper_get(0u);
  let step = rate / hyper_get(1u);
  let correction = hyper_get(2u);
  for (var i = group.x * 256u + thread; i < p.count; i += groups.x * 256u) {
    let g = gradient_get(i) * clip;
    let m = p.beta1 * first_moment_get(i) + (1.0 - p.beta1) * g;
    let v = p.beta2 * second_moment_get(i) + (1.0 - p.beta2) * g * g;
    let x = parameter_get(i) * (1.0 - rate * p.weight_decay);
    first_moment_put(i, m);
    second_moment_put(i, v);
    parameter_put(i, x - step * m / (sqrt(v) / correction + p.epsilon));
  }
}
