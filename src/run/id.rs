//! Run ids: short, readable, unique, and in order of creation: `261122-140512-otter`.

/// One of these ends an id, so that two runs of a day are told apart at a glance.
const WORDS: [&str; 64] = [
    "alder", "amber", "anchor", "aspen", "badger", "basil", "beacon", "birch", "brook", "canyon", "cedar", "cliff",
    "clover", "cobalt", "comet", "coral", "crane", "delta", "dune", "ember", "falcon", "fern", "finch", "fjord",
    "flint", "gale", "garnet", "glade", "harbor", "hazel", "heron", "indigo", "iris", "jade", "juniper", "kestrel",
    "lagoon", "lark", "linden", "lotus", "lynx", "maple", "meadow", "mesa", "nova", "oasis", "onyx", "opal", "orchid",
    "osprey", "otter", "pebble", "pine", "plover", "quartz", "raven", "reef", "robin", "sage", "spruce", "tern",
    "thistle", "willow", "wren",
];

/// An id for a run made now; another `attempt` gives another word.
pub fn fresh(attempt: usize) -> String {
    let now = chrono::Local::now();
    let word = WORDS[(now.timestamp_subsec_micros() as usize + std::process::id() as usize + attempt) % WORDS.len()];
    format!("{}-{word}", now.format("%y%m%d-%H%M%S"))
}
