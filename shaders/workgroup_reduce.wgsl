// Σ value, and the largest value, over the THREADS threads of a workgroup: the same in each of them, in a fixed order.
// SUBGROUPS  those of a subgroup at once, then one number of each; else halves upon halves through workgroup memory.
var<workgroup> reduced: array<f32, THREADS>;
#if SUBGROUPS
// Number of the thread's subgroup, how many there are, number of the thread in its own.
var<private> place: vec3<u32>;

fn workgroup_sum(value: f32, thread: u32) -> f32 {
  let part = subgroupAdd(value);
  if (place.z == 0u) { reduced[place.x] = part; }
  workgroupBarrier();
  var total = 0.0;
  for (var i = 0u; i < place.y; i++) { total += reduced[i]; }
  workgroupBarrier();
  return total;
}

fn workgroup_max(value: f32, thread: u32) -> f32 {
  let part = subgroupMax(value);
  if (place.z == 0u) { reduced[place.x] = part; }
  workgroupBarrier();
  var highest = reduced[0];
  for (var i = 1u; i < place.y; i++) { highest = max(highest, reduced[i]); }
  workgroupBarrier();
  return highest;
}
#else
fn workgroup_sum(value: f32, thread: u32) -> f32 {
  reduced[thread] = value;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { reduced[thread] += reduced[thread + half]; }
    workgroupBarrier();
  }
  let total = reduced[0];
  workgroupBarrier();
  return total;
}

fn workgroup_max(value: f32, thread: u32) -> f32 {
  reduced[thread] = value;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { reduced[thread] = max(reduced[thread], reduced[thread + half]); }
    workgroupBarrier();
  }
  let highest = reduced[0];
  workgroupBarrier();
  return highest;
}
#end

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
#if SUBGROUPS
        @builtin(subgroup_id) subgroup: u32, @builtin(num_subgroups) subgroups: u32,
        @builtin(subgroup_invocation_id) lane: u32,
#end
        @builtin(local_invocation_index) thread: u32) {
#if SUBGROUPS
  place = vec3<u32>(subgroup, subgroups, lane);
#end
  run(group.x, groups.x, thread);
}
