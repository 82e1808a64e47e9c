// SPDX-License-Identifier: GPL-2.0
//! Guest memory under the kernel's eyes: which pages are in use.

use super::memory::undisturbed;
use krabtest::{skip, tests};

tests! { "aging";
    aged(60);
}

/// The kernel looks which pages were used lately: of a guest's, those that it still uses.
fn aged() {
    const LRU: &str = "/sys/kernel/debug/lru_gen";
    let generation = || -> Option<(u64, u64, u64)> {
        let text = std::fs::read_to_string(LRU).ok()?;
        let number = |name: &str| {
            let line = text.lines().find(|line| line.trim().starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        // Behind the first "node" come its generations, the youngest last, up to the next heading.
        let lines = text.lines().skip_while(|line| !line.trim().starts_with("node")).skip(1);
        let numbers = lines.map_while(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Some((number("memcg")?, number("node")?, numbers.max()?))
    };
    if generation().is_none() {
        skip!("no multi-generational LRU");
    }
    let mut done = 0;
    undisturbed(30, |_, _| {
        if let Some((group, node, youngest)) = generation() {
            done += std::fs::write(LRU, format!("+ {group} {node} {youngest} 1 1\n")).is_ok() as u32;
        }
    });
    println!("# aged {done} times");
    assert!(done > 0, "the kernel took no request to age pages");
}
