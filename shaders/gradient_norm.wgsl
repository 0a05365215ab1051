// parts[first_part + group] = Σ g² over the group's elements, in a fixed order.
const THREADS = 256u;
#include workgroup_reduce

fn run(group: u32, groups: u32, thread: u32) {
  var sum = 0.0;
  for (var i = group * THREADS + thread; i < p.count; i += groups * THREADS) {
    let g = gradient_get(i);
    sum += g * g;
  }
  let total = workgroup_sum(sum, thread);
  if (thread == 0u) { parts_put(p.first_part + group, total); }
}
