// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::*;
use crate::irqchip::testing::Random;
use crate::irqchip::Trigger;
use std::vec::Vec;

const DEVICE: Origin = Origin::Device { ff_is_everybody: true };
const STRICT_DEVICE: Origin = Origin::Device { ff_is_everybody: false };

fn message(dest: u32, dest_mode: DestMode) -> Message {
    Message {
        dest,
        dest_mode,
        shorthand: Shorthand::None,
        delivery: DeliveryMode::Fixed,
        vector: 0x40,
        trigger: Trigger::Edge,
        assert: true,
        redirection_hint: false,
    }
}

fn xapic(id: u32, logical: u8, model: LogicalModel) -> ApicCard {
    ApicCard::new(id, id as u8, logical, model).with_present(true).with_software_enabled(true)
}

fn x2apic(id: u32) -> ApicCard {
    xapic(id, 0, LogicalModel::Flat).with_x2apic_mode(true)
}

fn table(cards: &[ApicCard]) -> Vec<CardCell> {
    let cells: Vec<CardCell> = cards.iter().map(|_| CardCell::new()).collect();
    cells.iter().zip(cards).for_each(|(cell, card)| cell.publish(*card));
    cells
}

fn targets(cards: &[ApicCard], message: &Message, origin: Origin) -> Vec<usize> {
    let cells = table(cards);
    let mut found = Vec::new();
    let count = for_each_target(&cells[..], message, origin, |index, card| {
        assert_eq!(card, cards[index]);
        found.push(index);
    });
    assert_eq!(count, found.len());
    found
}

/// What `for_each_target` is to do, without its short cuts.
fn plain(cards: &[ApicCard], message: &Message, origin: Origin) -> Vec<usize> {
    let is_source = |index| origin == Origin::Cpu(index);
    (0..cards.len()).filter(|&index| matches(cards[index], is_source(index), message, origin)).collect()
}

#[test]
fn physical() {
    let cards: Vec<ApicCard> = (0..4).map(|id| xapic(id, 0, LogicalModel::Flat)).collect();
    let cpu0 = Origin::Cpu(0);
    assert_eq!(targets(&cards, &message(2, DestMode::Physical), cpu0), [2]);
    assert_eq!(targets(&cards, &message(9, DestMode::Physical), cpu0), []);
    assert_eq!(targets(&cards, &message(0xFF, DestMode::Physical), cpu0), [0, 1, 2, 3]);
    // 32-bit broadcast means nothing to an xAPIC, and 102h does not alias to ID 2.
    assert_eq!(targets(&cards, &message(X2APIC_BROADCAST, DestMode::Physical), cpu0), []);
    assert_eq!(targets(&cards, &message(0x102, DestMode::Physical), cpu0), []);

    let cards: Vec<ApicCard> = (0..300).map(x2apic).collect();
    assert_eq!(targets(&cards, &message(255, DestMode::Physical), cpu0), [255]);
    assert_eq!(targets(&cards, &message(299, DestMode::Physical), cpu0), [299]);
    assert_eq!(targets(&cards, &message(300, DestMode::Physical), cpu0), []);
    assert_eq!(targets(&cards, &message(X2APIC_BROADCAST, DestMode::Physical), cpu0).len(), 300);
    // The broadcast quirk is for devices only.
    assert_eq!(targets(&cards, &message(255, DestMode::Physical), DEVICE).len(), 300);
    assert_eq!(targets(&cards, &message(255, DestMode::Physical), STRICT_DEVICE), [255]);
}

#[test]
fn a_cpu_that_still_is_in_xapic_mode_can_be_woken_by_its_wide_id() {
    let mut cards: Vec<ApicCard> = (0..300).map(x2apic).collect();
    cards[290] = xapic(290, 0, LogicalModel::Flat);
    assert_eq!(targets(&cards, &message(290, DestMode::Physical), Origin::Cpu(0)), [290]);
    // Its 8-bit ID, 22h, is not unique then: the CPU at that index is meant.
    assert_eq!(targets(&cards, &message(0x22, DestMode::Physical), Origin::Cpu(0)), [0x22]);
}

#[test]
fn cards_need_not_be_in_the_order_of_the_ids() {
    let cards = [x2apic(2), x2apic(1000), x2apic(0)];
    assert_eq!(targets(&cards, &message(1000, DestMode::Physical), Origin::Cpu(0)), [1]);
    assert_eq!(targets(&cards, &message(0, DestMode::Physical), Origin::Cpu(0)), [2]);
    assert_eq!(targets(&cards, &message(0x5, DestMode::Logical), Origin::Cpu(0)), [0, 2]);
    assert_eq!(targets(&cards, &message((62 << 16) | (1 << 8), DestMode::Logical), Origin::Cpu(0)), [1]);
}

#[test]
fn logical_flat_and_cluster() {
    let flat: Vec<ApicCard> = (0..8).map(|id| xapic(id, 1 << id, LogicalModel::Flat)).collect();
    assert_eq!(targets(&flat, &message(0xA1, DestMode::Logical), Origin::Cpu(0)), [0, 5, 7]);
    assert_eq!(targets(&flat, &message(0xFF, DestMode::Logical), Origin::Cpu(0)).len(), 8);
    assert_eq!(targets(&flat, &message(0, DestMode::Logical), Origin::Cpu(0)), []);

    let member = |id: u32| xapic(id, ((id / 4) << 4) as u8 | (1 << (id % 4)), LogicalModel::Cluster);
    let clusters: Vec<ApicCard> = (0..12).map(member).collect();
    assert_eq!(targets(&clusters, &message(0x16, DestMode::Logical), Origin::Cpu(0)), [5, 6]);
    assert_eq!(targets(&clusters, &message(0x31, DestMode::Logical), Origin::Cpu(0)), []);
    assert_eq!(targets(&clusters, &message(0xFF, DestMode::Logical), Origin::Cpu(0)).len(), 12);

    // A wide destination does not alias to an 8-bit logical ID.
    assert_eq!(targets(&flat, &message((1 << 16) | 1, DestMode::Logical), Origin::Cpu(0)), []);

    let odd = [xapic(0, 0xFF, LogicalModel::None)];
    assert_eq!(targets(&odd, &message(1, DestMode::Logical), Origin::Cpu(0)), []);
    assert_eq!(targets(&odd, &message(0xFF, DestMode::Logical), Origin::Cpu(0)), [0]);
}

#[test]
fn logical_x2apic() {
    let cards: Vec<ApicCard> = (0..70).map(x2apic).collect();
    assert_eq!(targets(&cards, &message((3 << 16) | 0x8001, DestMode::Logical), Origin::Cpu(0)), [48, 63]);
    // One member is not there: the others still get it.
    assert_eq!(targets(&cards, &message((4 << 16) | 0x0061, DestMode::Logical), Origin::Cpu(0)), [64, 69]);
    assert_eq!(targets(&cards, &message((5 << 16) | 1, DestMode::Logical), Origin::Cpu(0)), []);
    assert_eq!(targets(&cards, &message(0xFF, DestMode::Logical), Origin::Cpu(0)), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(targets(&cards, &message(0xFF, DestMode::Logical), DEVICE).len(), 70);
    assert_eq!(targets(&cards, &message(X2APIC_BROADCAST, DestMode::Logical), Origin::Cpu(0)).len(), 70);
}

#[test]
fn shorthands() {
    let mut cards: Vec<ApicCard> = (0..4).map(x2apic).collect();
    cards[3] = cards[3].with_present(false);
    let with = |shorthand| Message { shorthand, ..message(3, DestMode::Physical) };
    assert_eq!(targets(&cards, &with(Shorthand::Me), Origin::Cpu(1)), [1]);
    assert_eq!(targets(&cards, &with(Shorthand::Me), Origin::Cpu(3)), []);
    assert_eq!(targets(&cards, &with(Shorthand::Me), DEVICE), []);
    assert_eq!(targets(&cards, &with(Shorthand::All), Origin::Cpu(1)), [0, 1, 2]);
    assert_eq!(targets(&cards, &with(Shorthand::AllButMe), Origin::Cpu(1)), [0, 2]);
    assert_eq!(targets(&cards, &with(Shorthand::None), Origin::Cpu(1)), []);
}

#[test]
fn lowest_priority_takes_one_enabled_cpu_by_vector() {
    let mut cards: Vec<ApicCard> = (0..8).map(|id| xapic(id, 1 << id, LogicalModel::Flat)).collect();
    cards[2] = cards[2].with_software_enabled(false);
    let lowest =
        |vector, dest| Message { vector, delivery: DeliveryMode::LowestPriority, ..message(dest, DestMode::Logical) };
    assert_eq!(targets(&cards, &lowest(0x30, 0x0F), DEVICE), [0]);
    assert_eq!(targets(&cards, &lowest(0x31, 0x0F), DEVICE), [1]);
    assert_eq!(targets(&cards, &lowest(0x32, 0x0F), DEVICE), [3]);
    assert_eq!(targets(&cards, &lowest(0x30, 0x04), DEVICE), []);
    let hint = Message { redirection_hint: true, vector: 0x31, ..message(0x0F, DestMode::Logical) };
    assert_eq!(targets(&cards, &hint, DEVICE), [1]);
    // A physical broadcast goes to everybody, whatever it asks.
    let everybody = Message { dest_mode: DestMode::Physical, ..lowest(0x30, 0xFF) };
    assert_eq!(targets(&cards, &everybody, DEVICE).len(), 8);
}

#[test]
fn what_a_card_accepts() {
    let on = x2apic(1);
    let off = on.with_software_enabled(false);
    let gone = on.with_present(false);
    for delivery in (0..8).map(DeliveryMode::from_bits) {
        assert_eq!(on.accepts(delivery), delivery != DeliveryMode::ExtInt);
        assert_eq!(off.accepts(delivery), delivery != DeliveryMode::ExtInt && !delivery.is_vectored());
        assert!(!gone.accepts(delivery));
    }
    assert!(!ApicCard::default().is_present() && !ApicCard::default().takes_pic());
    assert!(ApicCard::default().with_takes_pic(true).takes_pic());
}

#[test]
fn clamping() {
    for count in [0usize, 1, 5, 4096] {
        for index in [0usize, 1, 4, 5, 4095, 4096, 1 << 31] {
            assert_eq!(clamp_index(index, count), if index < count { index } else { 0 });
        }
    }
}

#[test]
fn short_cuts_find_what_a_plain_search_finds() {
    let mut random = Random(7);
    for round in 0..20_000 {
        let count = 1 + random.below(40) as usize;
        let shift = if random.below(4) == 0 { 1 } else { 0 };
        let mixed = round % 3;
        let cards: Vec<ApicCard> = (0..count as u32)
            .map(|index| {
                let id = index + shift;
                let model = [LogicalModel::Flat, LogicalModel::Cluster, LogicalModel::None][random.below(3) as usize];
                let card = xapic(id, random.next() as u8, model);
                let wide = mixed == 0 || (mixed == 1 && random.flip());
                card.with_x2apic_mode(wide).with_present(random.below(8) != 0).with_software_enabled(random.flip())
            })
            .collect();
        let dest = match random.below(4) {
            0 => random.wide() as u32,
            1 => ((random.below(4) << 16) | random.below(0x1_0000)) as u32,
            2 => [XAPIC_BROADCAST, X2APIC_BROADCAST][random.below(2) as usize],
            _ => random.below(50) as u32,
        };
        let mode = DestMode::from_logical(random.flip());
        let mut sent = message(dest, mode);
        sent.vector = random.next() as u8;
        if random.below(3) == 0 {
            sent.delivery = DeliveryMode::LowestPriority;
        }
        sent.shorthand = match random.below(8) {
            0 => Shorthand::Me,
            1 => Shorthand::All,
            2 => Shorthand::AllButMe,
            _ => Shorthand::None,
        };
        let origin =
            [Origin::Cpu(random.below(count as u64) as usize), DEVICE, STRICT_DEVICE][random.below(3) as usize];
        let expected = plain(&cards, &sent, origin);
        let found = targets(&cards, &sent, origin);
        if sent.is_lowest_priority() && found.len() < expected.len() {
            assert!(found.iter().all(|index| expected.contains(index)));
            assert!(found.len() <= 1);
            let enabled = expected.iter().filter(|&&index| cards[index].is_enabled()).count();
            assert_eq!(found.is_empty(), enabled == 0, "{sent:?}");
        } else {
            assert_eq!(found, expected, "{sent:?} {origin:?}");
        }
    }
}
