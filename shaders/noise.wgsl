// output[i] = two halves of either sign between 1/4 and 1, drawn from i: what candidates are measured and compared on. As
// f32 and bf16 they are finite and small too.
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < p.count; i += groups.x * 256u) {
    var x = i * 747796405u + 2891336453u;
    x = (x ^ (x >> 15u)) * 739982445u;
    x = (x ^ (x >> 12u)) * 695872825u;
    output_put(i, ((x ^ (x >> 15u)) & 0x87ff87ffu) + 0x34003400u);
  }
}
