// n = x · inverse_rms, d = grad_output · (weight_offset + weight):
// grad_input = residual_grad + inverse_rms · (d - n · mean(d · n)). One workgroup a row.
// The gradient of the weight is column_sum's.
var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let base = group.x * p.columns;
  let inverse = inverse_rms_get(group.x);
  var dot = 0.0;
  for (var column = thread; column < p.columns; column += 128u) {
    let d = grad_output_get(base + column) * (p.weight_offset + weight_get(column));
    dot += d * input_get(base + column);
  }
  sums[thread] = dot;
  workgroupBarrier();
  for (var half = 64u; half > 0u; half /= 2u) {
    if (thread < half) { sums[thread] += sums[thread + half]; }
    workgroupBarrier();
  }
  let mean = sums[0] * inverse / f32(p.columns);
  for (var column = thread; column < p.columns; column += 128u) {
    let d = grad_output_get(base + column) * (p.weight_offset + weight_get(column));
    var value = inverse * (d - input_get(base + column) * inverse * mean);
#if RESIDUAL
    value += residual_grad_get(base + column);
#end
    grad_input_put(base + column, value);
  }
}
