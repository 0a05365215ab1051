// adamw with moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861): blocks of 256 codes, the first moment's in the
// signed table, the second's in the unsigned one, and one scale a block, the largest magnitude in it. A buffer holds
// its scales, then its codes, four to a word. One block a workgroup. Where a parameter is bound in parts, this one begins at
// `first_block` of those that are bound of its states.
var<workgroup> largest: array<vec2<f32>, 256>;
var<workgroup> codes: array<vec2<u32>, 256>;

// Code of the value nearest to x in the 256 ascending values from `base` of the table.
fn nearest(x: f32, base: u32) -> u32 {
  var low = 0u;
  var high = 255u;
  // The first value not below x.
  while (low < high) {
    let middle = (low + high) / 2u;
    if (table_get(base + middle) < x) { low = middle + 1u; } else { high = middle; }
  }
  if (low == 0u) { return 0u; }
  if (x - table_get(base + low - 1u) < table_get(base + low) - x) { return low - 1u; }
  return low;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let own = group.y * 65535u + group.x;
  let block = p.first_block + own;
  let i = own * 256u + thread;
  let inside = own < p.blocks && i < p.count;
  let norm = norm_get(0u);
  let finite = (bitcast<u32>(norm) & 0x7f800000u) != 0x7f800000u;
  var clip = 1.0;
  if (p.max_grad_norm > 0.0) { clip = min(1.0, p.max_grad_norm / (norm + 1e-6)); }
  var m = 0.0;
  var v = 0.0;
  let word = p.all_blocks + block * 64u + thread / 4u;
  let shift = (i % 4u) * 8u;
  if (inside) {
    let g = gradient_get(i) * clip;
    let first = table_get((first_moment_get(word) >> shift) & 255u) * bitcast<f32>(first_moment_get(block));
    let second = table_get(256u + ((second_moment_get(word) >> shift) & 255u)) * bitcast<f32>(second_moment_get(block));
    m = p.beta1 * first + (1.0 - p.beta1) * g;
    v = p.beta2 * second + (1.0 - p.beta2) * g * g;
  }
  largest[thread] = vec2<f32>(abs(m), abs(v));
  workgroupBarrier();
  for (var half = 128u; half > 0u; half /= 2u) {
    if (thread < half) { largest[thread] = max(largest[thread], largest[thread + half]); }
    workgroupBarrier();
  }
  let most = largest[0];
  let inverse = select(vec2<f32>(), 1.0 / most, most > vec2<f32>());
  codes[thread] = vec2<u32>(nearest(m * inverse.x, 0u), nearest(v * inverse.y, 256u));
  workgroupBarrier();
  if (!finite || !inside) { return; }
  let rate = hyper_get(0u);
  let x = parameter_get(i) * (1.0 - rate * p.weight_decay);
  parameter_put(i, x - rate / hyper_get(1u) * m / (sqrt(v) / hyper_get(2u) + p.epsilon));
  if (thread == 0u) {
    first_moment_put(block, bitcast<u32>(most.x));
    second_moment_put(block, bitcast<u32>(most.y));
  }
  if (thread % 4u == 0u) {
    // Codes past the last element are those of 0.
    let packed = codes[thread] | (codes[thread + 1u] << vec2<u32>(8u)) | (codes[thread + 2u] << vec2<u32>(16u)) | (codes[thread + 3u] << vec2<u32>(24u));
    first_moment_put(word, packed.x);
    second_moment_put(word, packed.y);
  }
}
