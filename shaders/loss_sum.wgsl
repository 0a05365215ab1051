// loss_sum += scale · Σ token_weights[t] · losses[t]. One workgroup, a fixed order.
var<workgroup> sums: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) thread: u32) {
  var sum = 0.0;
  for (var t = thread; t < p.tokens; t += 256u) {
    // A token without a target has loss 0, whatever its weight.
    let loss = losses_get(t);
    if (loss != 0.0) { sum += token_weights_get(t) * loss; }
  }
  sums[thread] = sum;
  workgroupBarrier();
  for (var half = 128u; half > 0u; half /= 2u) {
    if (thread < half) { sums[thread] += sums[thread + half]; }
    workgroupBarrier();
  }
  if (thread == 0u) { loss_sum_put(0u, loss_sum_get(0u) + scale_get(0u) * sums[0]); }
}
