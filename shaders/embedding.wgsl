// output[t] = scale · weight[ids[t]], for the tokens whose row is in first..first + rows of the table
// (a table larger than a binding comes in several parts).
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let token = group.x;
  let row = u32(ids_get(token)) - p.first;
  if (row >= p.rows) { return; }
  for (var column = thread; column < p.columns; column += 128u) {
    output_put(token * p.columns + column, p.scale * weight_get(row * p.columns + column));
  }
}
