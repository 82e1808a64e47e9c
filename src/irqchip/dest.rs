// SPDX-License-Identifier: GPL-2.0
//! Which local APICs a message is for. SDM "Determining IPI Destination", "Logical Destination Mode in x2APIC Mode".
//!
//! Each local APIC publishes an [`ApicCard`], one word that has all a sender needs. The cards of a VM belong in one
//! array of [`CardCell`], indexed by vCPU index: 64 CPUs are eight cache lines.
//!
//! As in KVM: a destination above 255 never aliases to an xAPIC's 8 bits, but it reaches a CPU that is still in
//! xAPIC mode by its x2APIC ID (a hot-plugged CPU can be woken); "lowest priority" takes the CPU by vector number.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use super::message::{DeliveryMode, DestMode, Message, Shorthand};
use core::sync::atomic::{AtomicU64, Ordering};

/// Destination format register: how an 8-bit logical ID is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogicalModel {
    Flat,
    Cluster,
    /// Any other DFR value: matches nothing but the broadcast.
    None,
}

/// What the world may know of a local APIC, in one word. All zero: no APIC, matches nothing.
///
/// Bits 0-31 x2APIC ID, 32-39 xAPIC ID, 40-47 xAPIC logical ID, 48-49 logical model, 50 x2APIC mode, 51 globally
/// enabled, 52 software enabled, 53 takes interrupts from the 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApicCard(u64);

impl ApicCard {
    const X2APIC: u64 = 1 << 50;
    const PRESENT: u64 = 1 << 51;
    const SOFTWARE_ENABLED: u64 = 1 << 52;
    const TAKES_PIC: u64 = 1 << 53;

    /// `x2apic_id` is the CPU's fixed ID, `xapic_id` the writable one, `logical_id` bits 31:24 of the xAPIC's LDR.
    pub const fn new(x2apic_id: u32, xapic_id: u8, logical_id: u8, model: LogicalModel) -> Self {
        let model = match model {
            LogicalModel::Flat => 0,
            LogicalModel::Cluster => 1,
            LogicalModel::None => 2,
        };
        Self(x2apic_id as u64 | ((xapic_id as u64) << 32) | ((logical_id as u64) << 40) | (model << 48))
    }

    const fn with(self, bit: u64, on: bool) -> Self {
        Self(if on { self.0 | bit } else { self.0 & !bit })
    }

    pub const fn with_x2apic_mode(self, on: bool) -> Self {
        self.with(Self::X2APIC, on)
    }

    /// Enabled in IA32_APIC_BASE.
    pub const fn with_present(self, on: bool) -> Self {
        self.with(Self::PRESENT, on)
    }

    /// Enabled in the spurious-interrupt vector register.
    pub const fn with_software_enabled(self, on: bool) -> Self {
        self.with(Self::SOFTWARE_ENABLED, on)
    }

    pub const fn with_takes_pic(self, on: bool) -> Self {
        self.with(Self::TAKES_PIC, on)
    }

    pub const fn x2apic_id(self) -> u32 {
        self.0 as u32
    }

    pub const fn xapic_id(self) -> u8 {
        (self.0 >> 32) as u8
    }

    const fn logical_id(self) -> u8 {
        (self.0 >> 40) as u8
    }

    pub const fn is_x2apic_mode(self) -> bool {
        self.0 & Self::X2APIC != 0
    }

    pub const fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Whether fixed interrupts are accepted: globally and software enabled.
    pub const fn is_enabled(self) -> bool {
        let both = Self::PRESENT | Self::SOFTWARE_ENABLED;
        self.0 & both == both
    }

    /// Whether this CPU takes the 8259A's interrupts: LINT0 in ExtINT mode, or the APIC globally disabled.
    pub const fn takes_pic(self) -> bool {
        self.0 & Self::TAKES_PIC != 0
    }

    /// Whether a message of this kind has any effect here, once its destination matches.
    pub const fn accepts(self, delivery: DeliveryMode) -> bool {
        match delivery {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.is_enabled(),
            DeliveryMode::ExtInt => false,
            _ => self.is_present(),
        }
    }

    fn matches_physical(self, dest: u32) -> bool {
        if self.is_x2apic_mode() {
            dest == self.x2apic_id() || dest == X2APIC_BROADCAST
        } else if dest > 0xFF {
            dest == self.x2apic_id()
        } else {
            dest == self.xapic_id() as u32 || dest == XAPIC_BROADCAST
        }
    }

    fn matches_logical(self, dest: u32) -> bool {
        if self.is_x2apic_mode() {
            let id = x2apic_logical_id(self.x2apic_id());
            return dest == X2APIC_BROADCAST || (id >> 16 == dest >> 16 && id & dest & 0xFFFF != 0);
        }
        let id = self.logical_id() as u32;
        match (self.0 >> 48) & 3 {
            _ if dest == XAPIC_BROADCAST => true,
            _ if dest > 0xFF => false,
            0 => id & dest != 0,
            1 => id >> 4 == dest >> 4 && id & dest & 0xF != 0,
            _ => false,
        }
    }
}

/// Destination of everybody, for an APIC in xAPIC mode.
pub const XAPIC_BROADCAST: u32 = 0xFF;
/// Destination of everybody, for an APIC in x2APIC mode.
pub const X2APIC_BROADCAST: u32 = 0xFFFF_FFFF;

/// The x2APIC logical ID: cluster in the upper half, one of 16 members in the lower.
pub const fn x2apic_logical_id(x2apic_id: u32) -> u32 {
    ((x2apic_id >> 4) << 16) | (1 << (x2apic_id & 0xF))
}

/// A card that one vCPU writes and every sender reads.
#[derive(Debug, Default)]
pub struct CardCell(AtomicU64);

impl CardCell {
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Called by the owner whenever its work says `card_changed`, before the guest runs on.
    #[inline]
    pub fn publish(&self, card: ApicCard) {
        self.0.store(card.0, Ordering::Release);
    }

    #[inline]
    pub fn card(&self) -> ApicCard {
        ApicCard(self.0.load(Ordering::Acquire))
    }
}

/// The cards of a VM, by vCPU index.
pub trait Cards {
    fn count(&self) -> usize;
    /// The card at `index`; an all-zero card for an index without a vCPU.
    fn card(&self, index: usize) -> ApicCard;
}

impl Cards for [CardCell] {
    #[inline]
    fn count(&self) -> usize {
        self.len()
    }

    #[inline]
    fn card(&self, index: usize) -> ApicCard {
        self.get(index).map_or(ApicCard(0), CardCell::card)
    }
}

/// Where a message comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The vCPU with this index: an IPI.
    Cpu(usize),
    /// A device. `ff_is_everybody`: destination FFh means everybody even to an APIC in x2APIC mode. That is KVM's way
    /// to have broadcasts without interrupt remapping; KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK turns it off.
    Device { ff_is_everybody: bool },
}

/// Whether the APIC with this card is a destination of `message`. `is_source`: the card is the sender's own.
#[inline]
pub fn matches(card: ApicCard, is_source: bool, message: &Message, origin: Origin) -> bool {
    if !card.is_present() {
        return false;
    }
    match message.shorthand {
        Shorthand::None => {}
        Shorthand::Me => return is_source,
        Shorthand::All => return true,
        Shorthand::AllButMe => return !is_source,
    }
    let mut dest = message.dest;
    if dest == XAPIC_BROADCAST && card.is_x2apic_mode() && origin == (Origin::Device { ff_is_everybody: true }) {
        dest = X2APIC_BROADCAST;
    }
    match message.dest_mode {
        DestMode::Physical => card.matches_physical(dest),
        DestMode::Logical => card.matches_logical(dest),
    }
}

/// `index` when it is below `count`, else 0, without a branch that a CPU could guess wrong: the index is the guest's.
#[inline]
fn clamp_index(index: usize, count: usize) -> usize {
    let below = index.wrapping_sub(core::hint::black_box(count)) as isize >> (usize::BITS - 1);
    index & below as usize
}

/// The vCPU that `message` most likely means, when its destination is a single APIC ID: the one whose index is its ID.
#[inline]
fn direct<C: Cards + ?Sized>(cards: &C, message: &Message) -> Option<usize> {
    let dest = message.dest as usize;
    if message.shorthand != Shorthand::None || message.dest_mode != DestMode::Physical || dest >= cards.count() {
        return None;
    }
    let card = cards.card(clamp_index(dest, cards.count()));
    let unicast = card.is_x2apic_mode() || message.dest != XAPIC_BROADCAST;
    (card.is_present() && unicast && card.matches_physical(message.dest)).then_some(dest)
}

/// Calls `visit` for every member of an x2APIC cluster destination, when each member's index is its ID. (In the first
/// half of cluster 0 a destination may mean xAPICs as well: not here.)
/// False, and nothing visited, when one is not where it is expected.
fn visit_cluster<C: Cards + ?Sized>(cards: &C, message: &Message, visit: &mut impl FnMut(usize, ApicCard)) -> bool {
    let members = message.dest & 0xFFFF;
    let is_plain = message.shorthand == Shorthand::None
        && message.dest_mode == DestMode::Logical
        && message.dest != X2APIC_BROADCAST
        && message.dest > 0xFF;
    if !is_plain || members == 0 {
        return false;
    }
    let first = ((message.dest >> 16) << 4) as usize;
    let each = |act: &mut dyn FnMut(usize, ApicCard)| {
        let mut rest = members;
        while rest != 0 {
            let index = first + rest.trailing_zeros() as usize;
            rest &= rest - 1;
            let card = if index < cards.count() { cards.card(clamp_index(index, cards.count())) } else { ApicCard(0) };
            act(index, card);
        }
    };
    let mut all_there = true;
    each(&mut |index, card| {
        all_there &= card.is_present() && card.is_x2apic_mode() && card.x2apic_id() as usize == index;
    });
    if all_there {
        each(visit);
    }
    all_there
}

/// Calls `visit(index, card)` for every vCPU that gets `message`, and returns how many there were.
/// The caller posts the message in each one's inbox. A single destination is found without a search when a vCPU's index
/// is its APIC ID; where a guest gives two xAPICs the same ID, only that vCPU gets it.
pub fn for_each_target<C: Cards + ?Sized>(
    cards: &C,
    message: &Message,
    origin: Origin,
    mut visit: impl FnMut(usize, ApicCard),
) -> usize {
    let broadcast_ff = message.dest == XAPIC_BROADCAST && origin == (Origin::Device { ff_is_everybody: true });
    if !broadcast_ff {
        if let Some(index) = direct(cards, message) {
            visit(index, cards.card(index));
            return 1;
        }
    }
    let source = match origin {
        Origin::Cpu(index) => Some(index),
        Origin::Device { .. } => None,
    };
    if message.shorthand == Shorthand::Me {
        let Some(index) = source else { return 0 };
        let card = cards.card(index);
        if card.is_present() {
            visit(index, card);
        }
        return card.is_present() as usize;
    }
    let everybody = message.dest_mode == DestMode::Physical
        && message.shorthand == Shorthand::None
        && matches!(message.dest, XAPIC_BROADCAST | X2APIC_BROADCAST);
    if message.is_lowest_priority() && !everybody {
        return visit_one(cards, message, origin, source, visit);
    }
    if visit_cluster(cards, message, &mut visit) {
        return (message.dest & 0xFFFF).count_ones() as usize;
    }
    let mut visited = 0usize;
    for index in 0..cards.count() {
        let card = cards.card(index);
        if matches(card, source == Some(index), message, origin) {
            visit(index, card);
            visited = visited.wrapping_add(1);
        }
    }
    visited
}

/// Lowest-priority arbitration: of N enabled destinations the one at position "vector modulo N".
fn visit_one<C: Cards + ?Sized>(
    cards: &C,
    message: &Message,
    origin: Origin,
    source: Option<usize>,
    mut visit: impl FnMut(usize, ApicCard),
) -> usize {
    let is_target =
        |index: usize, card: ApicCard| card.is_enabled() && matches(card, source == Some(index), message, origin);
    let candidates = (0..cards.count()).filter(|&index| is_target(index, cards.card(index))).count();
    let Some(position) = (message.vector as usize).checked_rem(candidates) else { return 0 };
    // A card may change between the passes: then the last one found is as good.
    let mut chosen = None;
    for (seen, index) in (0..cards.count()).filter(|&index| is_target(index, cards.card(index))).enumerate() {
        chosen = Some(index);
        if seen == position {
            break;
        }
    }
    let Some(index) = chosen else { return 0 };
    visit(index, cards.card(index));
    1
}
