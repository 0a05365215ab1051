// output[i] = input[rows[i]].
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = min(u32(rows_get(group.x)), p.rows - 1u);
  for (var column = thread; column < p.columns; column += 128u) {
    output_put(group.x * p.columns + column, input_get(row * p.columns + column));
  }
}
