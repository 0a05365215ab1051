// Keys and values of rows 0..T go to positions start..start + T of the cache, or of some heads' part of it.
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let position = u32(start_get(0u)) + group.x;
  if (position >= p.capacity) { return; }
  for (var column = thread; column < p.columns; column += 128u) {
    cache_key_put(position * p.columns + column, qkv_get(group.x * p.stride + p.key_start + column));
    cache_value_put(position * p.columns + column, qkv_get(group.x * p.stride + p.value_start + column));
  }
}
