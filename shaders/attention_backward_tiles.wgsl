// What the two halves of attention's backward pass on threads have in common.
#include attention_tiles
fn grad(row: u32, column: u32, head: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
#if RANGES
  let at = (row - p.query_first) * p.output_stride + head * HEAD_DIM + column;
#else
  let at = row * p.output_stride + head * HEAD_DIM + column;
#end
#if RAGGED
  var four = vec4<f32>(grad_output_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { four.y = grad_output_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { four.z = grad_output_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { four.w = grad_output_get(at + 3u); }
  return four;
#else
  return grad_output_get4(at);
#end
}
// Writes four columns of a row of the gradient from `start` on; of ranges it begins at the row grad_first.
fn put_four(row: u32, column: u32, start: u32, v: vec4<f32>) {
  if (row >= p.tokens || column >= HEAD_DIM) { return; }
#if RANGES
  let at = (row - p.grad_first) * p.stride + start + column;
#else
  let at = row * p.stride + start + column;
#end
#if MORE
#if RAGGED
#for i 4
  if (column + {i}u < HEAD_DIM) { grad_qkv_put(at + {i}u, grad_qkv_get(at + {i}u) + v[{i}]); }
#end
#else
  grad_qkv_put4(at, grad_qkv_get4(at) + v);
#end
#else
#if RAGGED
  grad_qkv_put(at, v.x);
  if (column + 1u < HEAD_DIM) { grad_qkv_put(at + 1u, v.y); }
  if (column + 2u < HEAD_DIM) { grad_qkv_put(at + 2u, v.z); }
  if (column + 3u < HEAD_DIM) { grad_qkv_put(at + 3u, v.w); }
#else
  grad_qkv_put4(at, v);
#end
#end
}
