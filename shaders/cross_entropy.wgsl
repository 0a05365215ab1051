// One row of logits a workgroup, z = softcap(logits):
// losses[t] = logsumexp(z) - z[target], 0 without a target;
// GRADIENT: logits = factor · token_weights[t] · (softmax(z) - onehot) · softcap'(logits), in place; `factor` is the
// loss scale, or with HALF_GRADIENT a fixed number: f16 gradients carry factor / loss scale until they reach a parameter.
const THREADS = 256u;
#include workgroup_reduce

fn capped(x: f32) -> f32 {
#if SOFTCAP
  return p.softcap * tanh(clamp(x / p.softcap, -15.0, 15.0));
#else
  return x;
#end
}

fn run(group: u32, groups: u32, thread: u32) {
  let token = p.first_token + group;
  let row = group * p.vocabulary;
  let label = targets_get(token);
  if (label < 0) {
    if (thread == 0u) { losses_put(token, 0.0); }
#if GRADIENT
    for (var i = thread; i < p.vocabulary; i += THREADS) { logits_put(row + i, 0.0); }
#end
    return;
  }
  var highest = -3.0e38;
  var sum = 0.0;
  for (var i = thread; i < p.vocabulary; i += THREADS) {
    let z = capped(logits_get(row + i));
    if (z > highest) {
      sum = sum * exp(highest - z) + 1.0;
      highest = z;
    } else {
      sum += exp(z - highest);
    }
  }
  let top = workgroup_max(highest, thread);
  let total = top + log(workgroup_sum(sum * exp(highest - top), thread));
  let correct = capped(logits_get(row + u32(label)));
  if (thread == 0u) { losses_put(token, total - correct); }
#if GRADIENT
  // Everybody has read the target's logit before it is overwritten.
  workgroupBarrier();
#if HALF_GRADIENT
  let factor = p.factor * token_weights_get(token);
#else
  let factor = scale_get(0u) * token_weights_get(token);
#end
  for (var i = thread; i < p.vocabulary; i += THREADS) {
    let z = capped(logits_get(row + i));
    var d = exp(z - total);
    if (i == u32(label)) { d -= 1.0; }
#if SOFTCAP
    let ratio = z / p.softcap;
    d *= 1.0 - ratio * ratio;
#end
    logits_put(row + i, factor * d);
  }
#end
}
