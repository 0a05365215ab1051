// Rotary position embedding in place (Su et al. 2021, arXiv 2104.09864), half-split layout: dimension i is paired
// with i + rotary_dim / 2, angle = position · inverse_frequency[i]. `sign` is -1 in the backward pass.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let half = p.rotary / 2u;
  let token = group.x;
  let position = f32(positions_get(token));
  for (var index = thread; index < p.heads * half; index += 64u) {
    let i = index % half;
    let angle = position * inverse_frequency_get(i);
    let c = cos(angle) * p.scale;
    let s = sin(angle) * p.scale * p.sign;
    let first = token * p.stride + p.start + (index / half) * p.head_dim + i;
    let x = tensor_get(first);
    let y = tensor_get(first + half);
    tensor_put(first, x * c - y * s);
    tensor_put(first + half, y * c + x * s);
  }
}
