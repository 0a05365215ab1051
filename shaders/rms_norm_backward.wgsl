// n = x · inverse_rms, d = grad_output · (weight_offset + weight):
// grad_input = residual_grad + inverse_rms · (d - n · mean(d · n)). One workgroup a row.
// The gradient of the weight is column_sum's.
const THREADS = 128u;
#include workgroup_reduce

fn run(group: u32, groups: u32, thread: u32) {
  let base = group * p.columns;
  let inverse = inverse_rms_get(group);
  var dot = 0.0;
  for (var column = thread; column < p.columns; column += THREADS) {
    let d = grad_output_get(base + column) * (p.weight_offset + weight_get(column));
    dot += d * input_get(base + column);
  }
  let total = workgroup_sum(dot, thread);
  let mean = total * inverse / f32(p.columns);
  for (var column = thread; column < p.columns; column += THREADS) {
    let d = grad_output_get(base + column) * (p.weight_offset + weight_get(column));
    var value = inverse * (d - input_get(base + column) * inverse * mean);
#if RESIDUAL
    value += residual_grad_get(base + column);
#end
    grad_input_put(base + column, value);
  }
}
