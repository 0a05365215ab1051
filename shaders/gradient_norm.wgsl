// parts[first_part + group] = Σ g² over the group's elements, in a fixed order.
var<workgroup> sums: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
  var sum = 0.0;
  for (var i = group.x * 256u + thread; i < p.count; i += groups.x * 256u) {
    let g = gradient_get(i);
    sum += g * g;
  }
  sums[thread] = sum;
  workgroupBarrier();
  for (var half = 128u; half > 0u; half /= 2u) {
    if (thread < half) { sums[thread] += sums[thread + half]; }
    workgroupBarrier();
  }
  if (thread == 0u) { parts_put(p.first_part + group.x, sums[0]); }
}
