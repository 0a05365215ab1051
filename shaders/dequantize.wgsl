// output[i] = weight[first + i], unpacked. `weight` holds the words of the whole tensor.
//
// NF4 (Dettmers et al. 2023, arXiv 2305.14314): level[code] · scale, blocks of 64 elements to a scale, the code of an even
// element in the upper half of its byte. Scales are offset + map[code] · group scale, 256 to a group (double quantization).
// INT8: code · scale of the row.
fn byte(start: u32, i: u32) -> u32 {
  return (weight_get(start + i / 4u) >> ((i % 4u) * 8u)) & 255u;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = group.x * 256u + thread; i < p.count; i += groups.x * 256u) {
    let element = p.first + i;
#if INT8
    let code = extractBits(bitcast<i32>(weight_get(element / 4u)), (element % 4u) * 8u, 8u);
    output_put(i, f32(code) * bitcast<f32>(weight_get(p.scales + element / p.columns)));
#else
    let block = element / 64u;
    let offset = bitcast<f32>(weight_get(p.offset));
    let scale = offset + table_get(byte(p.scales, block)) * bitcast<f32>(weight_get(p.group_scales + block / 256u));
    let code = (byte(0u, element / 2u) >> (4u - (element % 2u) * 4u)) & 15u;
    output_put(i, table_get(512u + code) * scale);
#end
  }
}
