// x = input + residual, kept in `sum` (without a residual x = input);
// inverse_rms = 1 / √(mean(x²) + epsilon); output = x · inverse_rms · (weight_offset + weight).
// (Zhang & Sennrich 2019, arXiv 1910.07467). One workgroup a row.
var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let base = group.x * p.columns;
  var square = 0.0;
  for (var column = thread; column < p.columns; column += 128u) {
    var x = input_get(base + column);
#if RESIDUAL
    x += residual_get(base + column);
    sum_put(base + column, x);
    x = sum_get(base + column);
#end
    square += x * x;
  }
  sums[thread] = square;
  workgroupBarrier();
  for (var half = 64u; half > 0u; half /= 2u) {
    if (thread < half) { sums[thread] += sums[thread + half]; }
    workgroupBarrier();
  }
  let inverse = 1.0 / sqrt(sums[0] / f32(p.columns) + p.epsilon);
  if (thread == 0u) { inverse_rms_put(group.x, inverse); }
  for (var column = thread; column < p.columns; column += 128u) {
#if RESIDUAL
    let x = sum_get(base + column);
#else
    let x = input_get(base + column);
#end
    output_put(base + column, x * inverse * (p.weight_offset + weight_get(column)));
  }
}
