// x = input + residual, kept in `sum` (without a residual x = input);
// inverse_rms = 1 / √(mean(x²) + epsilon); output = x · inverse_rms · (weight_offset + weight).
// (Zhang & Sennrich 2019, arXiv 1910.07467). One workgroup a row.
const THREADS = 128u;
#include workgroup_reduce

fn run(group: u32, groups: u32, thread: u32) {
  let base = group * p.columns;
  var square = 0.0;
  for (var column = thread; column < p.columns; column += THREADS) {
    var x = input_get(base + column);
#if RESIDUAL
    x += residual_get(base + column);
    sum_put(base + column, x);
    x = sum_get(base + column);
#end
    square += x * x;
  }
  let total = workgroup_sum(square, thread);
  let inverse = 1.0 / sqrt(total / f32(p.columns) + p.epsilon);
  if (thread == 0u) { inverse_rms_put(group, inverse); }
  for (var column = thread; column < p.columns; column += THREADS) {
#if RESIDUAL
    let x = sum_get(base + column);
#else
    let x = input_get(base + column);
#end
    output_put(base + column, x * inverse * (p.weight_offset + weight_get(column)));
  }
}
