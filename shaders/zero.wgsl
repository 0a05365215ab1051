// Sets words to 0.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = group.x * 256u + thread; i < p.count; i += groups.x * 256u) {
    output_put(i, 0u);
  }
}
