// SPDX-License-Identifier: GPL-2.0
//! GSI routing: from a global system interrupt to interrupt controller pins, or to a message. KVM API
//! "KVM_SET_GSI_ROUTING".
//!
//! A table is two slices that the caller owns: the routes sorted by GSI, and where each GSI's routes begin.
//! Not supported: Hyper-V and Xen routes (EINVAL).
#![forbid(unsafe_code)]

pub use crate::abi::irq::KvmIrqRoutingEntry as RawRoute;

use super::bits::Bits256;
use super::ioapic;
use super::message::{DeliveryMode, DestMode, Message, Shorthand, Trigger};

/// Number of GSIs, and of routes in a table: what KVM_CAP_IRQ_ROUTING says.
pub const MAX_ROUTES: usize = 4096;
/// Pins of the two 8259A together.
pub const PIC_PINS: u8 = 16;
/// A GSI has at most one route to each controller.
pub const MAX_ROUTES_PER_GSI: usize = 3;

const KIND_IRQCHIP: u32 = 1;
const KIND_MSI: u32 = 2;
const CHIP_PIC_MASTER: u32 = 0;
const CHIP_PIC_SLAVE: u32 = 1;
const CHIP_IOAPIC: u32 = 2;
const MSI_VALID_DEVID: u32 = 1;

/// EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// What of KVM_CAP_X2APIC_API and KVM_CAP_SPLIT_IRQCHIP matters here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteRules {
    /// Only the local APICs are in the kernel: no routes to pins.
    pub split_irqchip: bool,
    /// KVM_X2APIC_API_USE_32BIT_IDS: an MSI's upper address has bits 31:8 of the APIC ID.
    pub wide_ids: bool,
}

/// A message-signalled interrupt as a device would write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    pub address_lo: u32,
    pub address_hi: u32,
    pub data: u32,
}

impl Msi {
    /// EINVAL of KVM_SIGNAL_MSI and of routes: with wide IDs the low 8 bits of the upper address are reserved.
    pub const fn check(&self, wide_ids: bool) -> Result<(), Invalid> {
        if wide_ids && self.address_hi & 0xFF != 0 {
            return Err(Invalid);
        }
        Ok(())
    }

    /// SDM "Message Address Register Format", "Message Data Register Format".
    pub const fn message(&self, wide_ids: bool) -> Message {
        let high = if wide_ids { self.address_hi & !0xFF } else { 0 };
        Message {
            dest: (self.address_lo >> 12) & 0xFF | high,
            dest_mode: DestMode::from_logical(self.address_lo & (1 << 2) != 0),
            shorthand: Shorthand::None,
            delivery: DeliveryMode::from_bits(self.data >> 8),
            vector: self.data as u8,
            trigger: Trigger::from_level(self.data & (1 << 15) != 0),
            assert: true,
            redirection_hint: self.address_lo & (1 << 3) != 0,
        }
    }
}

/// Where an interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// 0 to 15: 8 and up are the slave's.
    Pic(u8),
    /// 0 to 23.
    Ioapic(u8),
    Msi(Msi),
}

impl Target {
    /// Whether a GSI may have both.
    const fn goes_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Pic(a), Self::Pic(b)) => a >> 3 != b >> 3,
            (Self::Pic(_), Self::Ioapic(_)) | (Self::Ioapic(_), Self::Pic(_)) => true,
            _ => false,
        }
    }
}

/// One route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub gsi: u32,
    pub target: Target,
}

impl Route {
    /// Decodes and checks one entry of KVM_SET_GSI_ROUTING.
    pub fn from_raw(raw: &RawRoute, rules: RouteRules) -> Result<Self, Invalid> {
        let allowed_flags = if raw.kind == KIND_MSI { MSI_VALID_DEVID } else { 0 };
        if raw.gsi as usize >= MAX_ROUTES || raw.flags & !allowed_flags != 0 {
            return Err(Invalid);
        }
        let word =
            |at| raw.u.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let target = match raw.kind {
            KIND_IRQCHIP if !rules.split_irqchip => pin_target(word(0), word(4))?,
            KIND_MSI => {
                let msi = Msi { address_lo: word(0), address_hi: word(4), data: word(8) };
                msi.check(rules.wide_ids)?;
                Target::Msi(msi)
            }
            _ => return Err(Invalid),
        };
        Ok(Self { gsi: raw.gsi, target })
    }
}

fn pin_target(chip: u32, pin: u32) -> Result<Target, Invalid> {
    let pins = match chip {
        CHIP_PIC_MASTER | CHIP_PIC_SLAVE => PIC_PINS as u32 / 2,
        CHIP_IOAPIC => ioapic::PINS as u32,
        _ => return Err(Invalid),
    };
    if pin >= pins {
        return Err(Invalid);
    }
    Ok(match chip {
        CHIP_IOAPIC => Target::Ioapic(pin as u8),
        CHIP_PIC_SLAVE => Target::Pic(pin as u8 + PIC_PINS / 2),
        _ => Target::Pic(pin as u8),
    })
}

/// The table of KVM_CREATE_IRQCHIP: every GSI goes to the I/O APIC pin of its number, the first 16 to the 8259A of that
/// number as well. (So GSI 0, the PIT, is I/O APIC pin 0; that boards wire it to pin 2 is for userspace to say.) The
/// split irqchip starts with an empty table.
pub const DEFAULT_ROUTES: [Route; 40] = {
    let mut routes = [Route { gsi: 0, target: Target::Ioapic(0) }; 40];
    let mut at = 0;
    let mut gsi = 0u8;
    while gsi < ioapic::PINS {
        routes[at] = Route { gsi: gsi as u32, target: Target::Ioapic(gsi) };
        at += 1;
        if gsi < PIC_PINS {
            routes[at] = Route { gsi: gsi as u32, target: Target::Pic(gsi) };
            at += 1;
        }
        gsi += 1;
    }
    routes
};

/// Length that `starts` of [`build`] needs: one more than the highest GSI plus one.
pub fn starts_len(routes: &[Route]) -> usize {
    routes.iter().map(|route| route.gsi as usize + 2).max().unwrap_or(1)
}

/// Sorts `routes` and fills `starts`, which is [`starts_len`] long: the routes of GSI g are
/// `routes[starts[g]..starts[g + 1]]`. Fails when a GSI goes twice to the same controller, or has another route beside
/// an MSI.
pub fn build(routes: &mut [Route], starts: &mut [u16]) -> Result<(), Invalid> {
    if routes.len() > MAX_ROUTES || starts.len() < starts_len(routes) {
        return Err(Invalid);
    }
    routes.sort_unstable_by_key(|route| route.gsi);
    for (at, route) in routes.iter().enumerate() {
        // Three at most share a GSI: a fourth clashes with one of the three before it.
        let before = routes.get(at.saturating_sub(MAX_ROUTES_PER_GSI)..at).unwrap_or(&[]);
        if before.iter().any(|other| other.gsi == route.gsi && !other.target.goes_with(route.target)) {
            return Err(Invalid);
        }
    }
    let mut next = 0;
    for (gsi, start) in starts.iter_mut().enumerate() {
        while routes.get(next).is_some_and(|route| (route.gsi as usize) < gsi) {
            next += 1;
        }
        *start = next as u16;
    }
    Ok(())
}

/// The routes of `gsi`, in a table that [`build`] made: none to three.
#[inline]
pub fn lookup<'a>(routes: &'a [Route], starts: &[u16], gsi: u32) -> &'a [Route] {
    let at = gsi as usize;
    let (Some(&from), Some(&to)) = (starts.get(at), starts.get(at.wrapping_add(1))) else { return &[] };
    routes.get(from as usize..to as usize).unwrap_or(&[])
}

/// Vectors of the level-triggered messages among the first `pins` GSIs: those of an I/O APIC in userspace, which wants to
/// know when such an interrupt ends (KVM_EXIT_IOAPIC_EOI).
pub fn level_vectors(routes: &[Route], pins: u32, wide_ids: bool) -> Bits256 {
    let mut vectors = Bits256::default();
    for route in routes.iter().filter(|route| route.gsi < pins) {
        if let Target::Msi(msi) = route.target {
            let message = msi.message(wide_ids);
            if message.trigger == Trigger::Level {
                vectors.set(message.vector);
            }
        }
    }
    vectors
}

/// The GSI that goes to a pin: the one to notify when that pin is acknowledged. A scan.
pub fn gsi_of(routes: &[Route], target: Target) -> Option<u32> {
    routes.iter().find(|route| route.target == target).map(|route| route.gsi)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::testing::Random;
    use std::vec;
    use std::vec::Vec;

    const FULL: RouteRules = RouteRules { split_irqchip: false, wide_ids: false };

    fn raw(gsi: u32, kind: u32, flags: u32, u: [u32; 3]) -> RawRoute {
        let mut bytes = [0; 32];
        bytes.chunks_exact_mut(4).zip(u).for_each(|(to, from)| to.copy_from_slice(&from.to_le_bytes()));
        RawRoute { gsi, kind, flags, pad: 0, u: bytes }
    }

    fn target(raw: RawRoute, rules: RouteRules) -> Result<Target, Invalid> {
        Route::from_raw(&raw, rules).map(|route| route.target)
    }

    fn table(routes: &mut [Route]) -> Result<Vec<u16>, Invalid> {
        let mut starts = vec![0xFFFF; starts_len(routes)];
        build(routes, &mut starts).map(|()| starts)
    }

    #[test]
    fn entries() {
        assert_eq!(target(raw(5, 1, 0, [0, 7, 0]), FULL), Ok(Target::Pic(7)));
        assert_eq!(target(raw(5, 1, 0, [1, 7, 0]), FULL), Ok(Target::Pic(15)));
        assert_eq!(target(raw(4095, 1, 0, [2, 23, 0]), FULL), Ok(Target::Ioapic(23)));
        let msi = Msi { address_lo: 0xFEE0_1000, address_hi: 0x55, data: 0x41 };
        assert_eq!(target(raw(5, 2, 1, [0xFEE0_1000, 0x55, 0x41]), FULL), Ok(Target::Msi(msi)));
        let refused = [
            raw(4096, 1, 0, [2, 0, 0]),
            raw(u32::MAX, 2, 0, [0, 0, 0]),
            raw(0, 0, 0, [2, 0, 0]),
            raw(0, 3, 0, [0, 0, 0]),
            raw(0, 5, 0, [0, 0, 0]),
            raw(0, 1, 1, [2, 0, 0]),
            raw(0, 2, 2, [0, 0, 0]),
            raw(0, 1, 0, [0, 8, 0]),
            raw(0, 1, 0, [1, 8, 0]),
            raw(0, 1, 0, [2, 24, 0]),
            raw(0, 1, 0, [3, 0, 0]),
            raw(0, 1, 0, [2, u32::MAX, 0]),
        ];
        for route in refused {
            assert_eq!(target(route, FULL), Err(Invalid), "{route:?}");
        }
        let split = RouteRules { split_irqchip: true, ..FULL };
        assert_eq!(target(raw(5, 1, 0, [2, 3, 0]), split), Err(Invalid));
        assert!(target(raw(5, 2, 0, [0, 0x55, 0]), split).is_ok());
        let wide = RouteRules { wide_ids: true, ..FULL };
        assert_eq!(target(raw(5, 2, 0, [0, 0x55, 0]), wide), Err(Invalid));
        assert!(target(raw(5, 2, 0, [0, 0x5500, 0]), wide).is_ok());
    }

    #[test]
    fn messages() {
        let msi = Msi { address_lo: 0xFEE5_A00C, address_hi: 0x1234_5600, data: 0x8141 };
        let message = msi.message(false);
        assert_eq!((message.dest, message.dest_mode), (0x5A, DestMode::Logical));
        assert_eq!((message.vector, message.delivery), (0x41, DeliveryMode::LowestPriority));
        assert_eq!((message.trigger, message.assert, message.redirection_hint), (Trigger::Level, true, true));
        assert_eq!(msi.message(true).dest, 0x1234_565A);
        let plain = Msi { address_lo: 0xFEE0_1000, address_hi: 0, data: 0x0042 }.message(false);
        assert_eq!((plain.dest, plain.dest_mode, plain.trigger), (1, DestMode::Physical, Trigger::Edge));
        assert_eq!((plain.delivery, plain.redirection_hint), (DeliveryMode::Fixed, false));
    }

    #[test]
    fn default_table() {
        let mut routes = DEFAULT_ROUTES;
        let starts = table(&mut routes).unwrap();
        for gsi in 0..24 {
            let found = lookup(&routes, &starts, gsi);
            assert_eq!(found.len(), if gsi < 16 { 2 } else { 1 });
            assert!(found.contains(&Route { gsi, target: Target::Ioapic(gsi as u8) }));
            assert_eq!(found.contains(&Route { gsi, target: Target::Pic(gsi as u8) }), gsi < 16);
        }
        for gsi in [24, 25, 4096, u32::MAX] {
            assert_eq!(lookup(&routes, &starts, gsi), &[]);
        }
        assert_eq!(gsi_of(&routes, Target::Pic(9)), Some(9));
        assert_eq!(gsi_of(&routes, Target::Pic(16)), None);
    }

    #[test]
    fn vectors_that_userspace_waits_for() {
        let msi = |gsi, data| Route { gsi, target: Target::Msi(Msi { data, ..Msi::default() }) };
        let routes = [
            msi(0, 0x8031),
            msi(1, 0x32),
            msi(23, 0x80FF),
            msi(24, 0x8033),
            Route { gsi: 2, target: Target::Ioapic(2) },
        ];
        let vectors = level_vectors(&routes, 24, false);
        let set: Vec<u8> = (0..=255).filter(|&vector| vectors.test(vector)).collect();
        assert_eq!(set, [0x31, 0xFF]);
        assert_eq!(level_vectors(&routes, 0, true), Bits256::default());
    }

    #[test]
    fn clashes() {
        let msi = Target::Msi(Msi::default());
        let clashing = [
            [Target::Ioapic(1), Target::Ioapic(2)],
            [Target::Pic(1), Target::Pic(2)],
            [Target::Pic(9), Target::Pic(10)],
            [Target::Ioapic(1), msi],
            [msi, Target::Pic(1)],
            [msi, msi],
        ];
        for targets in clashing {
            let mut same = targets.map(|target| Route { gsi: 7, target });
            assert_eq!(table(&mut same), Err(Invalid), "{targets:?}");
            let [a, b] = targets;
            assert!(table(&mut [Route { gsi: 7, target: a }, Route { gsi: 8, target: b }]).is_ok());
        }
        let three = [Target::Pic(1), Target::Pic(9), Target::Ioapic(1)].map(|target| Route { gsi: 7, target });
        let starts = table(&mut three.clone()).unwrap();
        assert_eq!(lookup(&three, &starts, 7).len(), MAX_ROUTES_PER_GSI);
        let [a, b, c] = three;
        assert_eq!(table(&mut [a, b, c, b]), Err(Invalid));
        // A short index, or too many routes.
        assert_eq!(build(&mut [a], &mut [0; 8]), Err(Invalid));
        let mut many: Vec<Route> = (0..4097).map(|gsi| Route { gsi: gsi % 4096, target: msi }).collect();
        assert_eq!(table(&mut many), Err(Invalid));
        assert_eq!(table(&mut []).unwrap(), [0]);
        assert_eq!(lookup(&[], &[0], 0), &[]);
    }

    #[test]
    fn lookup_finds_what_was_put_in() {
        let mut random = Random(17);
        for _ in 0..200 {
            let mut routes: Vec<Route> = Vec::new();
            for gsi in 0..random.below(300) as u32 {
                match random.below(4) {
                    0 => routes.push(Route { gsi, target: Target::Msi(Msi { data: gsi, ..Msi::default() }) }),
                    1 => {
                        routes.push(Route { gsi, target: Target::Ioapic(random.below(24) as u8) });
                        routes.push(Route { gsi, target: Target::Pic(random.below(16) as u8) });
                    }
                    _ => {}
                }
            }
            for at in (1..routes.len()).rev() {
                routes.swap(at, random.below(at as u64 + 1) as usize);
            }
            let wanted = routes.clone();
            let starts = table(&mut routes).unwrap();
            for gsi in 0..305 {
                let found = lookup(&routes, &starts, gsi);
                assert!(found.iter().all(|route| route.gsi == gsi && wanted.contains(route)));
                assert_eq!(found.len(), wanted.iter().filter(|route| route.gsi == gsi).count());
            }
        }
    }
}
