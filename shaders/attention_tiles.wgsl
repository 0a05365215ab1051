// What attention on threads has in common, forward and backward.
//   RANGES  a launch has the queries query_first..query_end, with which `qkv` and all that is bound of queries begins, and
//           the keys and values key_first..key_end, with which `keys` begins; without it, all of them
//   MORE    adds to a result of other ranges
// Tiles are 32 rows. Thread (y, x) of 16 x 16 owns rows 2y and 2y+1: of a 32x32 product columns x and x+16, of a
// 32 x HEAD_DIM product elements 4x..4x+4 of each 64 columns.
// 32 columns of a left tile (rows 9 vec4 apart, against bank conflicts) and of a right one, or 64 of one tile.
var<workgroup> stage: array<vec4<f32>, 576>;
var<workgroup> score: array<f32, 1056>;
var<workgroup> bound: u32;
#include attention_mask
// Four columns of a row of `qkv` from `start` on; zeros past the tokens and past the head. So of a row of `keys`.
fn qkv_four(row: u32, column: u32, start: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
#if RANGES
  let at = (row - p.query_first) * p.stride + start + column;
#else
  let at = row * p.stride + start + column;
#end
#if RAGGED
  var four = vec4<f32>(qkv_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { four.y = qkv_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { four.z = qkv_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { four.w = qkv_get(at + 3u); }
  return four;
#else
  return qkv_get4(at);
#end
}
fn query(row: u32, column: u32, head: u32) -> vec4<f32> { return qkv_four(row, column, head * HEAD_DIM); }
#if RANGES
fn keys_four(row: u32, column: u32, start: u32) -> vec4<f32> {
  if (row >= p.tokens || column >= HEAD_DIM) { return vec4<f32>(); }
  let at = (row - p.key_first) * p.stride + start + column;
#if RAGGED
  var four = vec4<f32>(keys_get(at), 0.0, 0.0, 0.0);
  if (column + 1u < HEAD_DIM) { four.y = keys_get(at + 1u); }
  if (column + 2u < HEAD_DIM) { four.z = keys_get(at + 2u); }
  if (column + 3u < HEAD_DIM) { four.w = keys_get(at + 3u); }
  return four;
#else
  return keys_get4(at);
#end
}
fn key(row: u32, column: u32, head: u32) -> vec4<f32> { return keys_four(row, column, p.key_start + head * HEAD_DIM); }
fn value(row: u32, column: u32, head: u32) -> vec4<f32> { return keys_four(row, column, p.value_start + head * HEAD_DIM); }
#else
fn key(row: u32, column: u32, head: u32) -> vec4<f32> { return qkv_four(row, column, p.key_start + head * HEAD_DIM); }
fn value(row: u32, column: u32, head: u32) -> vec4<f32> { return qkv_four(row, column, p.value_start + head * HEAD_DIM); }
#end
// Adds the products of the two tiles in `stage` over their 32 columns: rows 2y, 2y+1 of the left by x, x+16 of the right.
fn add_products(sum: vec4<f32>, x: u32, y: u32) -> vec4<f32> {
  var s = sum;
#for j 8
  {
    let a = stage[y * 18u + {j}u];
    let b = stage[y * 18u + 9u + {j}u];
    let c = stage[288u + x * 9u + {j}u];
    let d = stage[432u + x * 9u + {j}u];
    s += vec4<f32>(dot(a, c), dot(a, d), dot(b, c), dot(b, d));
  }
#end
  return s;
}
