// SPDX-License-Identifier: GPL-2.0
//! The CPUID filter: what KVM_GET_SUPPORTED_CPUID tells userspace it may give to a guest.
//!
//! Every feature is on a list of what Krab can virtualize; what is not listed is not passed on, whatever the host has.
//! Not supported, and so not shown: SVM and VMX for guests, performance counters of AMD, MONITOR, SMX, SGX, TSX, PT, CET, AMX, the
//! supervisor states of XSAVES, LAM, FRED, AVIC, memory encryption. SDM Vol. 2 "CPUID", APM Vol. 3 "CPUID Function ...".
#![forbid(unsafe_code)]

use super::pmu::PmuCaps;
use crate::abi::vcpu::{KvmCpuidEntry2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use crate::arch::cpuid::*;
use crate::arch::cr::xcr0;

/// What the module can virtualize on this host, beyond what CPUID says.
#[derive(Clone, Copy, Debug)]
pub struct HostFeatures {
    /// XSAVE components that the module switches: a subset of the host's XCR0. 0 without XSAVE.
    pub xcr0: u64,
    /// A guest can execute XSAVES, and then XSS is 0.
    pub xsaves: bool,
    /// TSC_AUX is switched: RDTSCP and RDPID.
    pub tsc_aux: bool,
    /// SPEC_CTRL is switched, and a guest can write PRED_CMD and FLUSH_CMD.
    pub spec_ctrl: bool,
    /// The host runs with LFENCE dispatch-serializing, though its CPUID may be too old to say so.
    pub lfence_serializing: bool,
    /// The TSC runs at one rate in all power states and on all CPUs.
    pub invariant_tsc: bool,
    /// The module's own walker can do five levels.
    pub la57: bool,
    /// Guest physical address bits that the nested tables can map, 32 to 52.
    pub nested_address_bits: u8,
    /// Paravirtual features, bits of [`kvm_eax`].
    pub pv_features: u32,
    /// The performance counters that guests can have.
    pub pmu: PmuCaps,
}

/// The paravirtual features: kvmclock, steal time, ends of interrupts, and three hypercalls.
pub const PV_FEATURES: u32 = kvm_eax::CLOCKSOURCE
    | kvm_eax::CLOCKSOURCE2
    | kvm_eax::CLOCKSOURCE_STABLE
    | kvm_eax::NOP_IO_DELAY
    | kvm_eax::STEAL_TIME
    | kvm_eax::PV_EOI
    | kvm_eax::PV_UNHALT
    | kvm_eax::PV_SEND_IPI
    | kvm_eax::PV_SCHED_YIELD;

/// The table does not fit: E2BIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall;

/// Highest basic leaf shown; what lies above is about features that Krab does not virtualize.
const MAX_BASIC: u32 = 0x1F;
/// Highest extended leaf shown.
const MAX_EXTENDED: u32 = 0x8000_0021;
/// Caches are enumerated until one has type 0; a host that never ends is cut off.
const MAX_CACHES: u32 = 16;

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

const LEAF1_ECX: u32 = {
    use leaf1_ecx::*;
    SSE3 | PCLMULQDQ | SSSE3 | CX16 | PCID | SSE4_1 | SSE4_2 | MOVBE | POPCNT | AES | RDRAND
};
/// Emulated, or true by definition: shown on every host.
const LEAF1_ECX_ALWAYS: u32 = leaf1_ecx::X2APIC | leaf1_ecx::TSC_DEADLINE | leaf1_ecx::HYPERVISOR;
const LEAF1_EDX: u32 = {
    use leaf1_edx::*;
    let old = FPU | VME | DE | PSE | TSC | MSR | PAE | MCE | CX8 | SEP | PGE | CMOV | PSE36 | CLFSH;
    old | MMX | FXSR | SSE | SSE2 | SS
};
/// The local APIC, MTRRs, machine-check banks and PAT are Krab's own.
const LEAF1_EDX_ALWAYS: u32 = leaf1_edx::APIC | leaf1_edx::MTRR | leaf1_edx::MCA | leaf1_edx::PAT;
const LEAF7_EBX: u32 = {
    use leaf7_ebx::*;
    let kernel = FSGSBASE | SMEP | SMAP | INVPCID | ERMS | CLFLUSHOPT | CLWB;
    kernel | BMI1 | BMI2 | RDSEED | ADX | SHA | FDP_EXCPTN_ONLY | ZERO_FCS_FDS
};
const LEAF7_ECX: u32 =
    leaf7_ecx::UMIP | leaf7_ecx::GFNI | leaf7_ecx::CLDEMOTE | leaf7_ecx::MOVDIRI | leaf7_ecx::MOVDIR64B;
const LEAF7_EDX: u32 = {
    use leaf7_edx::*;
    FSRM | MD_CLEAR | SERIALIZE | ARCH_CAPABILITIES
};
const LEAF7_1_EAX: u32 = {
    use leaf7_1_eax::*;
    CMPCCXADD | FZRM | FSRS | FSRC
};
const EXT1_ECX: u32 = {
    use ext1_ecx::*;
    LAHF | CMP_LEGACY | CR8_LEGACY | ABM | SSE4A | MISALIGNSSE | PREFETCHW | OSVW | TBM | TOPOEXT
};
const EXT1_EDX: u32 = {
    use ext1_edx::*;
    let repeated = LEAF1_EDX & !(leaf1_edx::SEP | leaf1_edx::CLFSH | leaf1_edx::SSE | leaf1_edx::SSE2 | leaf1_edx::SS);
    repeated | SYSCALL | NX | MMXEXT | FFXSR | PAGE1GB | LM | AMD3DNOWEXT | AMD3DNOW
};
const EXT1_EDX_ALWAYS: u32 = LEAF1_EDX_ALWAYS;
const EXT8_EBX: u32 = ext8_ebx::CLZERO
    | ext8_ebx::XSAVEERPTR
    | ext8_ebx::WBNOINVD
    | ext8_ebx::EFER_LMSLE_MBZ
    | ext8_ebx::SSB_NO
    | ext8_ebx::BTC_NO;
const EXT21_EAX: u32 = {
    use ext21_eax::*;
    let facts = NO_NESTED_DATA_BP | WRMSR_BASE_NON_SERIALIZING | LFENCE_SERIALIZING | NULL_SELECTOR_CLEARS_BASE;
    facts | VERW_CLEAR | AUTOMATIC_IBRS | PREFETCHI | SRSO_NO | SRSO_USER_KERNEL_NO
};

/// Bits of one register that are passed on if the host has them, under some condition.
struct Rule {
    function: u32,
    index: u32,
    register: usize,
    bits: u32,
    needs: Needs,
}

/// The condition of a [`Rule`].
#[derive(Clone, Copy)]
enum Needs {
    Nothing,
    /// All of these XSAVE components.
    Xcr0(u64),
    SpecCtrl,
    Xsaves,
    TscAux,
    La57,
    InvariantTsc,
}

const AVX: Needs = Needs::Xcr0(xcr0::X87 | xcr0::SSE | xcr0::AVX);
const AVX512: Needs = Needs::Xcr0(xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::OPMASK | xcr0::ZMM_HI256 | xcr0::HI16_ZMM);

const fn rule(function: u32, index: u32, register: usize, bits: u32, needs: Needs) -> Rule {
    Rule { function, index, register, bits, needs }
}

const RULES: &[Rule] = &[
    rule(1, 0, ECX, LEAF1_ECX, Needs::Nothing),
    rule(1, 0, ECX, leaf1_ecx::XSAVE, Needs::Xcr0(xcr0::X87 | xcr0::SSE)),
    rule(1, 0, ECX, leaf1_ecx::AVX | leaf1_ecx::FMA | leaf1_ecx::F16C, AVX),
    rule(1, 0, EDX, LEAF1_EDX, Needs::Nothing),
    rule(7, 0, EBX, LEAF7_EBX, Needs::Nothing),
    rule(7, 0, EBX, leaf7_ebx::AVX2, AVX),
    rule(7, 0, EBX, leaf7_ebx::AVX512F | leaf7_ebx::AVX512DQ | leaf7_ebx::AVX512_IFMA | leaf7_ebx::AVX512CD, AVX512),
    rule(7, 0, EBX, leaf7_ebx::AVX512BW | leaf7_ebx::AVX512VL, AVX512),
    rule(7, 0, ECX, LEAF7_ECX, Needs::Nothing),
    rule(7, 0, ECX, leaf7_ecx::VAES | leaf7_ecx::VPCLMULQDQ, AVX),
    rule(7, 0, ECX, leaf7_ecx::AVX512_VBMI | leaf7_ecx::AVX512_VBMI2 | leaf7_ecx::AVX512_VNNI, AVX512),
    rule(7, 0, ECX, leaf7_ecx::AVX512_BITALG | leaf7_ecx::AVX512_VPOPCNTDQ, AVX512),
    rule(7, 0, ECX, leaf7_ecx::PKU, Needs::Xcr0(xcr0::PKRU)),
    rule(7, 0, ECX, leaf7_ecx::LA57, Needs::La57),
    rule(7, 0, ECX, leaf7_ecx::RDPID, Needs::TscAux),
    rule(7, 0, EDX, LEAF7_EDX, Needs::Nothing),
    rule(7, 0, EDX, leaf7_edx::AVX512_VP2INTERSECT | leaf7_edx::AVX512_FP16, AVX512),
    rule(7, 0, EDX, leaf7_edx::SPEC_CTRL | leaf7_edx::STIBP | leaf7_edx::SSBD, Needs::SpecCtrl),
    rule(7, 0, EDX, leaf7_edx::L1D_FLUSH, Needs::SpecCtrl),
    rule(7, 1, EAX, LEAF7_1_EAX, Needs::Nothing),
    rule(7, 1, EAX, leaf7_1_eax::SHA512 | leaf7_1_eax::SM3 | leaf7_1_eax::SM4, AVX),
    rule(7, 1, EAX, leaf7_1_eax::AVX_VNNI | leaf7_1_eax::AVX_IFMA, AVX),
    rule(7, 1, EAX, leaf7_1_eax::AVX512_BF16, AVX512),
    rule(7, 1, EDX, leaf7_1_edx::PREFETCHITI, Needs::Nothing),
    rule(7, 1, EDX, leaf7_1_edx::AVX_VNNI_INT8 | leaf7_1_edx::AVX_NE_CONVERT | leaf7_1_edx::AVX_VNNI_INT16, AVX),
    rule(7, 2, EDX, leaf7_2_edx::MCDT_NO, Needs::Nothing),
    rule(7, 2, EDX, leaf7_2_edx::PSFD | leaf7_2_edx::IPRED_CTRL | leaf7_2_edx::RRSBA_CTRL, Needs::SpecCtrl),
    rule(7, 2, EDX, leaf7_2_edx::DDPD_U | leaf7_2_edx::BHI_CTRL, Needs::SpecCtrl),
    rule(0xD, 1, EAX, leaf_d_1_eax::XSAVEOPT | leaf_d_1_eax::XSAVEC | leaf_d_1_eax::XGETBV1, Needs::Xcr0(xcr0::X87)),
    rule(0xD, 1, EAX, leaf_d_1_eax::XSAVES, Needs::Xsaves),
    rule(0x8000_0001, 0, ECX, EXT1_ECX, Needs::Nothing),
    rule(0x8000_0001, 0, ECX, ext1_ecx::XOP | ext1_ecx::FMA4, AVX),
    rule(0x8000_0001, 0, EDX, EXT1_EDX, Needs::Nothing),
    rule(0x8000_0001, 0, EDX, ext1_edx::RDTSCP, Needs::TscAux),
    rule(0x8000_0007, 0, EDX, ext7_edx::INVARIANT_TSC, Needs::InvariantTsc),
    rule(0x8000_0008, 0, EBX, EXT8_EBX, Needs::Nothing),
    rule(0x8000_0008, 0, EBX, ext8_ebx::IBPB | ext8_ebx::IBRS | ext8_ebx::STIBP | ext8_ebx::SSBD, Needs::SpecCtrl),
    rule(0x8000_0008, 0, EBX, ext8_ebx::IBRS_ALWAYS_ON | ext8_ebx::STIBP_ALWAYS_ON, Needs::SpecCtrl),
    rule(0x8000_0008, 0, EBX, ext8_ebx::IBRS_PREFERRED | ext8_ebx::IBRS_SAME_MODE, Needs::SpecCtrl),
    rule(0x8000_0008, 0, EBX, ext8_ebx::PSFD | ext8_ebx::IBPB_RET, Needs::SpecCtrl),
    rule(0x8000_0021, 0, EAX, EXT21_EAX, Needs::Nothing),
    rule(0x8000_0021, 0, EAX, ext21_eax::SBPB | ext21_eax::IBPB_BRTYPE, Needs::SpecCtrl),
    rule(0x8000_0021, 0, ECX, ext21_ecx::TSA_SQ_NO | ext21_ecx::TSA_L1_NO, Needs::Nothing),
];

impl Needs {
    fn met(self, features: &HostFeatures) -> bool {
        match self {
            Self::Nothing => true,
            Self::Xcr0(components) => features.xcr0 & components == components,
            Self::SpecCtrl => features.spec_ctrl,
            Self::Xsaves => features.xcr0 != 0 && features.xsaves,
            Self::TscAux => features.tsc_aux,
            Self::La57 => features.la57,
            Self::InvariantTsc => features.invariant_tsc,
        }
    }
}

/// What of a host register a guest may see.
fn allowed(function: u32, index: u32, register: usize, features: &HostFeatures) -> u32 {
    RULES
        .iter()
        .filter(|rule| rule.function == function && rule.index == index && rule.register == register)
        .filter(|rule| rule.needs.met(features))
        .fold(0, |bits, rule| bits | rule.bits)
}

/// Whether CPUID with this EAX looks at ECX.
pub const fn is_indexed(function: u32) -> bool {
    matches!(
        function,
        4 | 7 | 0xB | 0xD | 0xF | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1D | 0x1E | 0x1F | 0x24 | 0x8000_001D
    )
}

/// The numbers of the components in `mask` that lie behind the legacy region and the header.
fn components(mask: u64) -> impl Iterator<Item = u32> {
    (2..63).filter(move |number| mask.wrapping_shr(*number) & 1 != 0)
}

/// Bytes of an XSAVE area for the components `mask`. `component(i)` is leaf 0Dh, subleaf `i`: size in EAX, standard
/// offset in EBX, bit 1 of ECX: starts on 64 bytes in the compacted format. SDM Vol. 1 "XSAVE Area".
pub fn xsave_bytes(mask: u64, compacted: bool, component: impl Fn(u32) -> [u32; 4]) -> u32 {
    // The legacy region and the header are always there.
    let mut total = 512u32 + 64;
    for i in components(mask) {
        let [size, offset, flags, _] = component(i);
        let start = match (compacted, flags & 2 != 0) {
            (false, _) => offset,
            (true, false) => total,
            (true, true) => total.saturating_add(63) & !63,
        };
        total = total.max(start.saturating_add(size));
    }
    total
}

/// The table that KVM_GET_SUPPORTED_CPUID returns, written to the start of `out`; its number of entries.
///
/// `host` executes CPUID with EAX and ECX, all on one CPU. Registers are EAX, EBX, ECX, EDX.
pub fn supported(
    host: impl Fn(u32, u32) -> [u32; 4],
    features: &HostFeatures,
    out: &mut [KvmCpuidEntry2],
) -> Result<usize, TooSmall> {
    let mut filter = Filter { host, features, out, count: 0 };
    let max_basic = (filter.host)(0, 0)[EAX].min(MAX_BASIC);
    for function in 0..=max_basic {
        filter.basic(function, max_basic)?;
    }
    let host_extended = (filter.host)(0x8000_0000, 0)[EAX];
    if (0x8000_0000..0x8000_FFFF).contains(&host_extended) {
        // Leaf 8000_0021h says what a guest must otherwise find out from MSRs. KVM also gives it where the host ends
        // at 8000_001Dh or above; below that, clients would take leaf 8000_001Dh for present.
        let synthesized = features.lfence_serializing && host_extended >= 0x8000_001D;
        let max_extended = if synthesized { MAX_EXTENDED } else { host_extended.min(MAX_EXTENDED) };
        for function in 0x8000_0000..=max_extended {
            filter.extended(function, host_extended, max_extended)?;
        }
    }
    let [b, c, d] = KVM_SIGNATURE;
    filter.push(KVM_SIGNATURE_LEAF, 0, [KVM_FEATURES_LEAF, b, c, d])?;
    filter.push(KVM_FEATURES_LEAF, 0, [features.pv_features, 0, 0, 0])?;
    Ok(filter.count)
}

struct Filter<'a, H> {
    host: H,
    features: &'a HostFeatures,
    out: &'a mut [KvmCpuidEntry2],
    count: usize,
}

impl<H: Fn(u32, u32) -> [u32; 4]> Filter<'_, H> {
    fn push(&mut self, function: u32, index: u32, registers: [u32; 4]) -> Result<(), TooSmall> {
        let [eax, ebx, ecx, edx] = registers;
        let flags = if is_indexed(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        let place = self.out.get_mut(self.count).ok_or(TooSmall)?;
        *place = KvmCpuidEntry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] };
        self.count += 1;
        Ok(())
    }

    /// The host's registers, each with the bits that the rules allow.
    fn ruled(&self, function: u32, index: u32) -> [u32; 4] {
        let mut registers = (self.host)(function, index);
        for (number, register) in registers.iter_mut().enumerate() {
            *register &= allowed(function, index, number, self.features);
        }
        registers
    }

    fn basic(&mut self, function: u32, max_basic: u32) -> Result<(), TooSmall> {
        let host = (self.host)(function, 0);
        match function {
            0 => self.push(0, 0, [max_basic, host[EBX], host[ECX], host[EDX]]),
            1 => {
                let ruled = self.ruled(1, 0);
                // Of EBX only the CLFLUSH size: APIC id and CPU count are those of the host.
                let registers =
                    [host[EAX], host[EBX] & 0xFF00, ruled[ECX] | LEAF1_ECX_ALWAYS, ruled[EDX] | LEAF1_EDX_ALWAYS];
                self.push(1, 0, registers)
            }
            2 => self.push(2, 0, host),
            4 => self.caches(4),
            6 => self.push(6, 0, [leaf6_eax::ARAT, 0, 0, 0]),
            7 => {
                let subleaves = host[EAX].min(2);
                let mut ruled = self.ruled(7, 0);
                ruled[EAX] = subleaves;
                ruled[EBX] |= leaf7_ebx::TSC_ADJUST;
                self.push(7, 0, ruled)?;
                for index in 1..=subleaves {
                    let ruled = self.ruled(7, index);
                    self.push(7, index, ruled)?;
                }
                Ok(())
            }
            0xA => self.push(0xA, 0, self.features.pmu.leaf()),
            0xD => self.xsave(),
            // Topology (0Bh, 1Fh) is for userspace to fill in; the rest describes what a guest does not have.
            _ => self.push(function, 0, [0; 4]),
        }
    }

    fn caches(&mut self, function: u32) -> Result<(), TooSmall> {
        for index in 0..MAX_CACHES {
            let registers = (self.host)(function, index);
            self.push(function, index, registers)?;
            if registers[EAX] & 0x1F == 0 {
                break;
            }
        }
        Ok(())
    }

    fn xsave(&mut self) -> Result<(), TooSmall> {
        let mask = self.features.xcr0;
        if mask == 0 {
            return self.push(0xD, 0, [0; 4]);
        }
        let component = |index| (self.host)(0xD, index);
        let size = xsave_bytes(mask, false, component);
        let compacted = xsave_bytes(mask, true, component);
        self.push(0xD, 0, [mask as u32, size, size, (mask >> 32) as u32])?;
        let [instructions, ..] = self.ruled(0xD, 1);
        let compacted = if instructions & leaf_d_1_eax::XSAVEC != 0 { compacted } else { 0 };
        self.push(0xD, 1, [instructions, compacted, 0, 0])?;
        for index in components(mask) {
            let [size, offset, flags, _] = (self.host)(0xD, index);
            // Bit 0 would be a supervisor component, bit 2 is about XFD.
            self.push(0xD, index, [size, offset, flags & 2, 0])?;
        }
        Ok(())
    }

    fn extended(&mut self, function: u32, host_extended: u32, max_extended: u32) -> Result<(), TooSmall> {
        let host = if function <= host_extended { (self.host)(function, 0) } else { [0; 4] };
        let registers = match function {
            0x8000_0000 => [max_extended, host[EBX], host[ECX], host[EDX]],
            0x8000_0001 => {
                let ruled = self.ruled(function, 0);
                // Bits 16 to 27 of EBX are reserved; 28 to 31 are the package type.
                [host[EAX], host[EBX] & 0xF000_FFFF, ruled[ECX], ruled[EDX] | self.aliases(host[EDX])]
            }
            // Brand string, and the caches and TLBs of old.
            0x8000_0002..=0x8000_0006 => host,
            0x8000_0008 => self.address_sizes(host),
            0x8000_0019 => [host[EAX], host[EBX], 0, 0],
            0x8000_001A => [host[EAX] & 7, 0, 0, 0],
            0x8000_001D => return self.caches_of_extended(host_extended),
            0x8000_0021 => {
                let mut ruled = if function <= host_extended { self.ruled(function, 0) } else { [0; 4] };
                ruled[EAX] |= ext21_eax::NO_SMM_CTL_MSR;
                if self.features.lfence_serializing {
                    ruled[EAX] |= ext21_eax::LFENCE_SERIALIZING;
                }
                ruled
            }
            // Whatever is ruled is shown, the rest is 0: topology (1Eh), SVM (0Ah), IBS (1Bh), encryption (1Fh) ...
            _ => self.ruled(function, 0),
        };
        self.push(function, 0, registers)
    }

    fn caches_of_extended(&mut self, host_extended: u32) -> Result<(), TooSmall> {
        if host_extended >= 0x8000_001D {
            self.caches(0x8000_001D)
        } else {
            self.push(0x8000_001D, 0, [0; 4])
        }
    }

    /// AMD repeats leaf 1 in leaf 8000_0001h, Intel does not.
    fn aliases(&self, host_edx: u32) -> u32 {
        if host_edx & leaf1_edx::FPU != 0 {
            EXT1_EDX_ALWAYS
        } else {
            0
        }
    }

    /// EAX of leaf 8000_0008h: physical, linear and guest physical address bits; ECX: CPUs per package.
    fn address_sizes(&self, host: [u32; 4]) -> [u32; 4] {
        let physical = host[EAX] & 0xFF;
        let linear = (host[EAX] >> 8 & 0xFF).max(48);
        let linear = if self.features.la57 { linear } else { linear.min(48) };
        let guest = physical.min(u32::from(self.features.nested_address_bits));
        let [_, ebx, ..] = self.ruled(0x8000_0008, 0);
        [physical | linear << 8 | guest << 16, ebx, host[ECX] & 0xF0FF, 0]
    }
}
