// output[i] = weight[first + i], unpacked. `weight` holds the words of the whole tensor.
//
// NF4 (Dettmers et al. 2023, arXiv 2305.14314): level[code] · scale, blocks of 64 elements to a scale, the code of an even
// element in the upper half of its byte. Scales are offset + map[code] · group scale, 256 to a group (double quantization).
// INT8: code · scale of the row.
//
//   EIGHTS  everything is in eights, of which a thread takes four at once; WORDS  the output is f16, written as words of two
fn byte(start: u32, i: u32) -> u32 {
  return (weight_get(start + i / 4u) >> ((i % 4u) * 8u)) & 255u;
}

#if INT8
fn scale(element: u32) -> f32 { return bitcast<f32>(weight_get(p.scales + element / p.columns)); }
#else
fn scale(element: u32) -> f32 {
  let block = element / 64u;
  let offset = bitcast<f32>(weight_get(p.offset));
  return offset + table_get(byte(p.scales, block)) * bitcast<f32>(weight_get(p.group_scales + block / 256u));
}
var<workgroup> level: array<f32, 16>;
#end

fn code(word: u32, shift: u32) -> f32 {
#if INT8
  return f32(extractBits(bitcast<i32>(word), shift, 8u));
#else
  return level[extractBits(word, shift, 4u)];
#end
}

#if EIGHTS
struct Codes { words: vec2<u32>, scale: f32 }

fn codes(element: u32) -> Codes {
#if INT8
  return Codes(vec2<u32>(weight_get(element / 4u), weight_get(element / 4u + 1u)), scale(element));
#else
  return Codes(vec2<u32>(weight_get(element / 8u), 0u), scale(element));
#end
}

fn put8(i: u32, c: Codes) {
  let w = c.words.x;
#if INT8
  let v = c.words.y;
  let low = c.scale * vec4<f32>(code(w, 0u), code(w, 8u), code(w, 16u), code(w, 24u));
  let high = c.scale * vec4<f32>(code(v, 0u), code(v, 8u), code(v, 16u), code(v, 24u));
#else
  let low = c.scale * vec4<f32>(code(w, 4u), code(w, 0u), code(w, 12u), code(w, 8u));
  let high = c.scale * vec4<f32>(code(w, 20u), code(w, 16u), code(w, 28u), code(w, 24u));
#end
#if WORDS
  output[i / 8u] = vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
#else
  output_put4(i, low);
  output_put4(i + 4u, high);
#end
}
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
#if !INT8
  if (thread < 16u) { level[thread] = table_get(512u + thread); }
  workgroupBarrier();
#end
#if EIGHTS
  // Four at a time: a scale is three reads, each of which waits for the one before.
  let apart = groups.x * 2048u;
  let last = p.count - 8u;
  for (var i = (group.x * 256u + thread) * 8u; i < p.count; i += 4u * apart) {
    let second = i + apart;
    let third = second + apart;
    let fourth = third + apart;
    let c = codes(p.first + i);
    let d = codes(p.first + min(second, last));
    let e = codes(p.first + min(third, last));
    let f = codes(p.first + min(fourth, last));
    put8(i, c);
    if (second < p.count) { put8(second, d); }
    if (third < p.count) { put8(third, e); }
    if (fourth < p.count) { put8(fourth, f); }
  }
#else
  for (var i = group.x * 256u + thread; i < p.count; i += groups.x * 256u) {
    let element = p.first + i;
#if INT8
    output_put(i, code(weight_get(element / 4u), (element % 4u) * 8u) * scale(element));
#else
    output_put(i, code(weight_get(element / 8u), (element % 8u) / 2u * 8u + 4u - (element % 2u) * 4u) * scale(element));
#end
  }
#end
}
