// Counter-based random numbers: the chain of program::random. `key` is seed low, seed high, update, micro-batch.
fn mix(value: u32) -> u32 {
  var x = value;
  x ^= x >> 16u; x *= 0x7feb352du;
  x ^= x >> 15u; x *= 0x846ca68bu;
  return x ^ (x >> 16u);
}

// The part of the chain that is the same for a whole stream.
fn random_stream(stream: u32) -> u32 {
  var x = mix(key_get(0u) ^ 0x9e3779b9u);
  x = mix(x ^ key_get(1u));
  x = mix(x ^ key_get(2u));
  x = mix(x ^ key_get(3u));
  return mix(x ^ stream);
}

fn random_bits(stream: u32, row: u32, column: u32) -> u32 {
  return mix(mix(stream ^ row) ^ column);
}

// Uniform in [0, 1).
fn random_uniform(stream: u32, row: u32, column: u32) -> f32 {
  return f32(random_bits(stream, row, column) >> 8u) * (1.0 / 16777216.0);
}
