// output[i] = weight[first + i], unpacked. `weight` holds the words of the whole tensor.
//
// NF4 (Dettmers et al. 2023, arXiv 2305.14314): level[code] · scale, blocks of 64 elements to a scale, the code of an even
// element in the upper half of its byte. Scales are offset + map[code] · group scale, 256 to a group (double quantization).
// INT8: code · scale of the row.
//
//   TRANSPOSED  output[k, n] of a weight [n, k] instead, in f16 as words of two; rows and columns are multiples of 64
//   EIGHTS  everything is in eights, of which a thread takes four at once; WORDS  the output is f16, written as words of two
//
// A scale of NF4 takes two reads, one of which waits for the other: in eights a group of threads reads those of its 8,192 elements
// once, and the map beside them, so that all reads are under way together.
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
#if EIGHTS
// One more where the first element is not the first of its block.
var<workgroup> scales: array<f32, 129>;
var<workgroup> map: array<f32, 256>;
#end
#end

fn code(word: u32, shift: u32) -> f32 {
#if INT8
  return f32(extractBits(bitcast<i32>(word), shift, 8u));
#else
  return level[extractBits(word, shift, 4u)];
#end
}

#if TRANSPOSED
// 64 columns of 32 pairs of rows; a word more in a row, against bank conflicts.
var<workgroup> pairs: array<u32, 64u * 33u>;

// A pair of rows side by side, eight columns of them from `column` on.
fn put_pairs(column: u32, pair: u32, low: array<vec4<f32>, 2>, high: array<vec4<f32>, 2>) {
#for h 2
#for j 4
  pairs[(column + {h}u * 4u + {j}u) * 33u + pair] = pack2x16float(vec2<f32>(low[{h}][{j}], high[{h}][{j}]));
#end
#end
}

#if INT8
fn eight(element: u32, s: f32) -> array<vec4<f32>, 2> {
  let v = weight_get(element / 4u);
  let w = weight_get(element / 4u + 1u);
  return array<vec4<f32>, 2>(s * vec4<f32>(code(v, 0u), code(v, 8u), code(v, 16u), code(v, 24u)),
                             s * vec4<f32>(code(w, 0u), code(w, 8u), code(w, 16u), code(w, 24u)));
}
#else
fn eight(element: u32, s: f32) -> array<vec4<f32>, 2> {
  let w = weight_get(element / 8u);
  return array<vec4<f32>, 2>(s * vec4<f32>(code(w, 4u), code(w, 0u), code(w, 12u), code(w, 8u)),
                             s * vec4<f32>(code(w, 20u), code(w, 16u), code(w, 28u), code(w, 24u)));
}
#end

// A tile of 64 rows, each of which has one scale of NF4 there, by 64 columns.
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
#if !INT8
  if (thread < 16u) { level[thread] = table_get(512u + thread); }
  workgroupBarrier();
#end
  let column = thread % 8u * 8u;
  let pair = thread / 8u;
  let element = p.first + (group.y * 64u + 2u * pair) * p.columns + group.x * 64u + column;
  let next = element + p.columns;
  put_pairs(column, pair, eight(element, scale(element)), eight(next, scale(next)));
  workgroupBarrier();
#for r 2
  {
    let row = pair + {r}u * 32u;
    let at = row * 33u + thread % 8u * 4u;
    output[((group.x * 64u + row) * p.rows + group.y * 64u) / 8u + thread % 8u] =
      vec4<u32>(pairs[at], pairs[at + 1u], pairs[at + 2u], pairs[at + 3u]);
  }
#end
}
#else
#if EIGHTS
fn put8(i: u32, low: vec4<f32>, high: vec4<f32>) {
#if WORDS
  output[i / 8u] = vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
#else
  output_put4(i, low);
  output_put4(i + 4u, high);
#end
}

#if INT8
fn unpack8(i: u32, v: u32, w: u32, s: f32) {
  put8(i, s * vec4<f32>(code(v, 0u), code(v, 8u), code(v, 16u), code(v, 24u)),
       s * vec4<f32>(code(w, 0u), code(w, 8u), code(w, 16u), code(w, 24u)));
}
#else
fn unpack8(i: u32, w: u32, s: f32) {
  put8(i, s * vec4<f32>(code(w, 4u), code(w, 0u), code(w, 12u), code(w, 8u)),
       s * vec4<f32>(code(w, 20u), code(w, 16u), code(w, 28u), code(w, 24u)));
}
#end
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
#if !INT8
  if (thread < 16u) { level[thread] = table_get(512u + thread); }
#if EIGHTS
  map[thread] = table_get(thread);
  let offset = bitcast<f32>(weight_get(p.offset));
#else
  workgroupBarrier();
#end
#end
#if EIGHTS
  let last = p.count - 8u;
  for (var start = group.x * 8192u; start < p.count; start += groups.x * 8192u) {
    let i = start + thread * 8u;
    let second = i + 2048u;
    let third = i + 4096u;
    let fourth = i + 6144u;
    let e = (p.first + vec4<u32>(min(i, last), min(second, last), min(third, last), min(fourth, last)));
#if INT8
    let v = vec4<u32>(weight_get(e.x / 4u), weight_get(e.y / 4u), weight_get(e.z / 4u), weight_get(e.w / 4u));
    let w = vec4<u32>(weight_get(e.x / 4u + 1u), weight_get(e.y / 4u + 1u), weight_get(e.z / 4u + 1u), weight_get(e.w / 4u + 1u));
    let s = vec4<f32>(scale(e.x), scale(e.y), scale(e.z), scale(e.w));
    if (i < p.count) { unpack8(i, v.x, w.x, s.x); }
    if (second < p.count) { unpack8(second, v.y, w.y, s.y); }
    if (third < p.count) { unpack8(third, v.z, w.z, s.z); }
    if (fourth < p.count) { unpack8(fourth, v.w, w.w, s.w); }
#else
    let w = vec4<u32>(weight_get(e.x / 8u), weight_get(e.y / 8u), weight_get(e.z / 8u), weight_get(e.w / 8u));
    let block = (p.first + start) / 64u;
    let own = block + thread;
    let scaled = thread < 129u && own * 64u < p.first + p.count;
    var scale_code = 0u;
    var group_scale = 0.0;
    if (scaled) {
      scale_code = byte(p.scales, own);
      group_scale = bitcast<f32>(weight_get(p.group_scales + own / 256u));
    }
    // The tables are there, and all have read the scales before.
    workgroupBarrier();
    if (scaled) { scales[thread] = offset + map[scale_code] * group_scale; }
    workgroupBarrier();
    if (i < p.count) { unpack8(i, w.x, scales[e.x / 64u - block]); }
    if (second < p.count) { unpack8(second, w.y, scales[e.y / 64u - block]); }
    if (third < p.count) { unpack8(third, w.z, scales[e.z / 64u - block]); }
    if (fourth < p.count) { unpack8(fourth, w.w, scales[e.w / 64u - block]); }
#end
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
#end
