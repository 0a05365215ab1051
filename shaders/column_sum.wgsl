// parts[part, column] = Σ over the part's rows of grad[row, column], for the gradient of a bias; with NORM, of
// grad[row, column] · input[row, column] · inverse_rms[row], for the gradient of a norm's weight.
// Rows are added in order; partial_sum adds the parts.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let column = group.x * 64u + thread;
  if (column >= p.columns) { return; }
  var sum = 0.0;
  let end = min(p.rows, (group.y + 1u) * p.part_rows);
  for (var row = group.y * p.part_rows; row < end; row++) {
#if NORM
    sum += grad_get(row * p.stride + p.start + column) * input_get(row * p.columns + column) * inverse_rms_get(row);
#else
    sum += grad_get(row * p.stride + p.start + column);
#end
  }
  parts_put(group.y * p.columns + column, sum);
}
