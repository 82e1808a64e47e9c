// SPDX-License-Identifier: GPL-2.0
//! Between KVM's register structures and the guest words of the rest of the module.
#![forbid(unsafe_code)]

use super::vcpu::{KvmDtable, KvmRegs, KvmSegment, KvmSregs, KvmSregs2, KVM_SREGS2_FLAGS_PDPTRS_VALID};
use super::vm::{KvmUserspaceMemoryRegion, KvmUserspaceMemoryRegion2};
use crate::{
    arch::{
        cr::rflags,
        segment::{DescriptorTable, Segment, SegmentAttributes},
    },
    guest::{Gpr, Regs, SystemRegs},
};

/// Without guest_memfd the first 32 bytes are all there is.
impl From<KvmUserspaceMemoryRegion2> for KvmUserspaceMemoryRegion {
    fn from(region: KvmUserspaceMemoryRegion2) -> Self {
        let KvmUserspaceMemoryRegion2 { slot, flags, guest_phys_addr, memory_size, userspace_addr, .. } = region;
        Self { slot, flags, guest_phys_addr, memory_size, userspace_addr }
    }
}

impl From<&Regs> for KvmRegs {
    fn from(regs: &Regs) -> Self {
        let gpr = |name: Gpr| regs.gpr[name as usize];
        Self {
            rax: gpr(Gpr::Rax),
            rbx: gpr(Gpr::Rbx),
            rcx: gpr(Gpr::Rcx),
            rdx: gpr(Gpr::Rdx),
            rsi: gpr(Gpr::Rsi),
            rdi: gpr(Gpr::Rdi),
            rsp: gpr(Gpr::Rsp),
            rbp: gpr(Gpr::Rbp),
            r8: gpr(Gpr::R8),
            r9: gpr(Gpr::R9),
            r10: gpr(Gpr::R10),
            r11: gpr(Gpr::R11),
            r12: gpr(Gpr::R12),
            r13: gpr(Gpr::R13),
            r14: gpr(Gpr::R14),
            r15: gpr(Gpr::R15),
            rip: regs.rip,
            rflags: regs.rflags,
        }
    }
}

impl From<&KvmRegs> for Regs {
    fn from(kvm: &KvmRegs) -> Self {
        Self {
            gpr: [
                kvm.rax, kvm.rcx, kvm.rdx, kvm.rbx, kvm.rsp, kvm.rbp, kvm.rsi, kvm.rdi, kvm.r8, kvm.r9, kvm.r10,
                kvm.r11, kvm.r12, kvm.r13, kvm.r14, kvm.r15,
            ],
            rip: kvm.rip,
            rflags: kvm.rflags | rflags::FIXED,
        }
    }
}

impl From<&Segment> for KvmSegment {
    fn from(segment: &Segment) -> Self {
        let bits = segment.attributes.0;
        let bit = |mask: u16| u8::from(bits & mask != 0);
        Self {
            base: segment.base,
            limit: segment.limit,
            selector: segment.selector,
            kind: segment.attributes.kind(),
            present: bit(SegmentAttributes::P),
            dpl: segment.attributes.dpl(),
            db: bit(SegmentAttributes::DB),
            s: bit(SegmentAttributes::S),
            l: bit(SegmentAttributes::L),
            g: bit(SegmentAttributes::G),
            avl: bit(SegmentAttributes::AVL),
            unusable: u8::from(!segment.attributes.present()),
            padding: 0,
        }
    }
}

impl From<&KvmSegment> for Segment {
    fn from(kvm: &KvmSegment) -> Self {
        let bit = |value: u8, mask: u16| if value & 1 != 0 { mask } else { 0 };
        let bits = u16::from(kvm.kind & 0xF)
            | bit(kvm.s, SegmentAttributes::S)
            | u16::from(kvm.dpl & 3) << 5
            | bit(kvm.present & u8::from(kvm.unusable == 0), SegmentAttributes::P)
            | bit(kvm.avl, SegmentAttributes::AVL)
            | bit(kvm.l, SegmentAttributes::L)
            | bit(kvm.db, SegmentAttributes::DB)
            | bit(kvm.g, SegmentAttributes::G);
        Self { base: kvm.base, limit: kvm.limit, selector: kvm.selector, attributes: SegmentAttributes(bits) }
    }
}

fn table(table: DescriptorTable) -> KvmDtable {
    KvmDtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

fn from_table(kvm: &KvmDtable) -> DescriptorTable {
    DescriptorTable { base: kvm.base, limit: kvm.limit }
}

impl KvmSregs {
    /// `interrupt`: the vector of one that is on its way to the guest, for the bitmap.
    #[inline]
    pub fn new(regs: &SystemRegs, apic_base: u64, interrupt: Option<u8>) -> Self {
        let word = |number: u8| match interrupt {
            Some(vector) if vector >> 6 == number => 1 << (vector & 63),
            _ => 0,
        };
        let [es, cs, ss, ds, fs, gs] = &regs.segments;
        Self {
            cs: cs.into(),
            ds: ds.into(),
            es: es.into(),
            fs: fs.into(),
            gs: gs.into(),
            ss: ss.into(),
            tr: (&regs.tr).into(),
            ldt: (&regs.ldtr).into(),
            gdt: table(regs.gdtr),
            idt: table(regs.idtr),
            cr0: regs.cr0,
            cr2: regs.cr2,
            cr3: regs.cr3,
            cr4: regs.cr4,
            cr8: regs.cr8,
            efer: regs.efer,
            apic_base,
            interrupt_bitmap: [word(0), word(1), word(2), word(3)],
        }
    }
}

impl KvmSregs2 {
    /// `pdptrs`: of a guest with PAE paging.
    pub fn new(sregs: &KvmSregs, pdptrs: Option<[u64; 4]>) -> Self {
        let KvmSregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } =
            *sregs;
        let flags = if pdptrs.is_some() { KVM_SREGS2_FLAGS_PDPTRS_VALID } else { 0 };
        let pdptrs = pdptrs.unwrap_or([0; 4]);
        Self { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs }
    }

    /// What it has in common with the older structure, and the entries if they count. `None` for an unknown flag.
    pub fn parts(&self) -> Option<(KvmSregs, Option<[u64; 4]>)> {
        let Self { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs } =
            *self;
        if flags & !KVM_SREGS2_FLAGS_PDPTRS_VALID != 0 {
            return None;
        }
        let interrupt_bitmap = [0; 4];
        let sregs = KvmSregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            interrupt_bitmap,
        };
        Some((sregs, (flags != 0).then_some(pdptrs)))
    }
}

impl From<&KvmSregs> for SystemRegs {
    /// The privilege level is SS's descriptor privilege level, as hardware has it.
    fn from(kvm: &KvmSregs) -> Self {
        Self {
            segments: [&kvm.es, &kvm.cs, &kvm.ss, &kvm.ds, &kvm.fs, &kvm.gs].map(Segment::from),
            ldtr: (&kvm.ldt).into(),
            tr: (&kvm.tr).into(),
            gdtr: from_table(&kvm.gdt),
            idtr: from_table(&kvm.idt),
            cr0: kvm.cr0,
            cr2: kvm.cr2,
            cr3: kvm.cr3,
            cr4: kvm.cr4,
            cr8: kvm.cr8,
            efer: kvm.efer,
            cpl: kvm.ss.dpl & 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{FromBytes, IntoBytes};

    #[test]
    fn registers_come_back() {
        let bytes: std::vec::Vec<u8> = (0..144).collect();
        let kvm = KvmRegs::read_from_bytes(&bytes).unwrap();
        let back = KvmRegs::from(&Regs::from(&kvm));
        assert_eq!(back, KvmRegs { rflags: kvm.rflags | 2, ..kvm });
    }

    #[test]
    fn both_forms_of_the_system_registers_say_the_same() {
        let bytes: std::vec::Vec<u8> = (0..312).map(|n| n as u8).collect();
        let sregs = KvmSregs { interrupt_bitmap: [0; 4], ..KvmSregs::read_from_bytes(&bytes).unwrap() };
        let plain = KvmSregs2::new(&sregs, None);
        assert_eq!((plain.flags, plain.pdptrs, plain.parts()), (0, [0; 4], Some((sregs, None))));
        assert_eq!(plain.as_bytes()[..280], sregs.as_bytes()[..280]);
        let pae = KvmSregs2::new(&sregs, Some([1, 2, 3, 4]));
        assert_eq!(pae.parts(), Some((sregs, Some([1, 2, 3, 4]))));
        assert_eq!(KvmSregs2 { flags: 3, ..pae }.parts(), None);
    }

    #[test]
    fn segments_come_back_and_unusable_is_not_present() {
        for bits in 0..0x1000u16 {
            let segment = Segment { base: 7, limit: 9, selector: 8, attributes: SegmentAttributes(bits) };
            assert_eq!(Segment::from(&KvmSegment::from(&segment)), segment);
        }
        let mut kvm = KvmSegment::read_from_bytes(&[0; 24]).unwrap();
        kvm.present = 1;
        kvm.unusable = 1;
        assert!(!Segment::from(&kvm).attributes.present());
        assert_eq!(kvm.as_bytes().len(), 24);
    }

    #[test]
    fn system_registers_come_back() {
        let regs = SystemRegs {
            segments: core::array::from_fn(|n| Segment { base: n as u64, selector: n as u16, ..Segment::default() }),
            cr0: 1,
            cr2: 2,
            cr3: 3,
            cr4: 4,
            cr8: 8,
            efer: 5,
            gdtr: DescriptorTable { base: 6, limit: 7 },
            ..SystemRegs::default()
        };
        assert_eq!(SystemRegs::from(&KvmSregs::new(&regs, 0, None)), regs);
        assert_eq!(KvmSregs::new(&regs, 0, None).interrupt_bitmap, [0; 4]);
        assert_eq!(KvmSregs::new(&regs, 0, Some(0x20)).interrupt_bitmap, [1 << 32, 0, 0, 0]);
        assert_eq!(KvmSregs::new(&regs, 0, Some(0xC1)).interrupt_bitmap, [0, 0, 0, 2]);
    }
}
