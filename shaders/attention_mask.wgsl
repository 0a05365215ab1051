// Lowest token that `query` sees.
fn lowest_key(query: u32) -> u32 {
  var lowest = u32(document_start_get(query));
#if WINDOW
  if (query + 1u > p.window) { lowest = max(lowest, query + 1u - p.window); }
#end
  return lowest;
}

// Scores after scaling and soft cap.
fn capped(s: vec4<f32>) -> vec4<f32> {
#if SOFTCAP
  return p.softcap * tanh(clamp(s * (p.scale / p.softcap), vec4<f32>(-15.0), vec4<f32>(15.0)));
#else
  return s * p.scale;
#end
}
