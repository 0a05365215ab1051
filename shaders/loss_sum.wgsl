// loss_sum += scale · Σ token_weights[t] · losses[t]. One workgroup, a fixed order.
const THREADS = 256u;
#include workgroup_reduce

fn run(group: u32, groups: u32, thread: u32) {
  var sum = 0.0;
  for (var t = thread; t < p.tokens; t += THREADS) {
    // A token without a target has loss 0, whatever its weight. What is no number is none either: `!=` would leave it out.
    let loss = losses_get(t);
    if (!(loss == 0.0)) { sum += token_weights_get(t) * loss; }
  }
  let total = workgroup_sum(sum, thread);
  if (thread == 0u) { loss_sum_put(0u, loss_sum_get(0u) + scale_get(0u) * total); }
}
