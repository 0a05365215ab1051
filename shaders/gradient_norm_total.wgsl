// norm = √Σ parts. One workgroup.
const THREADS = 256u;
#include workgroup_reduce

fn run(group: u32, groups: u32, thread: u32) {
  var sum = 0.0;
  for (var i = thread; i < p.count; i += THREADS) { sum += parts_get(i); }
  let total = workgroup_sum(sum, thread);
  if (thread == 0u) { norm_put(0u, sqrt(total)); }
}
