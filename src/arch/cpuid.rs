// SPDX-License-Identifier: GPL-2.0
//! CPUID leaves and the feature bits that Krab knows. SDM Vol. 2 "CPUID", APM Vol. 3 "Obtaining Processor Information Via
//! the CPUID Instruction". A bit that is not named here is never shown to a guest.
#![forbid(unsafe_code)]

/// Constants for single bits of one register of one leaf.
macro_rules! bits {
    ($($(#[$doc:meta])* $register:ident { $($name:ident = $bit:literal,)* })*) => {$(
        $(#[$doc])*
        pub mod $register {
            $(pub const $name: u32 = 1 << $bit;)*
        }
    )*};
}

bits! {
    /// Leaf 1, ECX.
    leaf1_ecx {
        SSE3 = 0, PCLMULQDQ = 1, MONITOR = 3, SSSE3 = 9, FMA = 12, CX16 = 13, PCID = 17, SSE4_1 = 19, SSE4_2 = 20,
        X2APIC = 21, MOVBE = 22, POPCNT = 23, TSC_DEADLINE = 24, AES = 25, XSAVE = 26, OSXSAVE = 27, AVX = 28, F16C = 29,
        RDRAND = 30, HYPERVISOR = 31,
    }
    /// Leaf 1, EDX; leaf 8000_0001h, EDX repeats many of them.
    leaf1_edx {
        FPU = 0, VME = 1, DE = 2, PSE = 3, TSC = 4, MSR = 5, PAE = 6, MCE = 7, CX8 = 8, APIC = 9, SEP = 11, MTRR = 12,
        PGE = 13, MCA = 14, CMOV = 15, PAT = 16, PSE36 = 17, CLFSH = 19, MMX = 23, FXSR = 24, SSE = 25, SSE2 = 26, SS = 27,
    }
    /// Leaf 6, EAX.
    leaf6_eax {
        ARAT = 2,
    }
    /// Leaf 7, subleaf 0, EBX.
    leaf7_ebx {
        FSGSBASE = 0, TSC_ADJUST = 1, BMI1 = 3, AVX2 = 5, FDP_EXCPTN_ONLY = 6, SMEP = 7, BMI2 = 8, ERMS = 9, INVPCID = 10,
        ZERO_FCS_FDS = 13, AVX512F = 16, AVX512DQ = 17, RDSEED = 18, ADX = 19, SMAP = 20, AVX512_IFMA = 21,
        CLFLUSHOPT = 23, CLWB = 24, AVX512CD = 28, SHA = 29, AVX512BW = 30, AVX512VL = 31,
    }
    /// Leaf 7, subleaf 0, ECX.
    leaf7_ecx {
        AVX512_VBMI = 1, UMIP = 2, PKU = 3, OSPKE = 4, AVX512_VBMI2 = 6, GFNI = 8, VAES = 9, VPCLMULQDQ = 10,
        AVX512_VNNI = 11, AVX512_BITALG = 12, AVX512_VPOPCNTDQ = 14, LA57 = 16, RDPID = 22, CLDEMOTE = 25, MOVDIRI = 27,
        MOVDIR64B = 28,
    }
    /// Leaf 7, subleaf 0, EDX.
    leaf7_edx {
        FSRM = 4, AVX512_VP2INTERSECT = 8, MD_CLEAR = 10, SERIALIZE = 14, AVX512_FP16 = 23, SPEC_CTRL = 26, STIBP = 27,
        L1D_FLUSH = 28, ARCH_CAPABILITIES = 29, SSBD = 31,
    }
    /// Leaf 7, subleaf 1, EAX.
    leaf7_1_eax {
        SHA512 = 0, SM3 = 1, SM4 = 2, AVX_VNNI = 4, AVX512_BF16 = 5, CMPCCXADD = 7, FZRM = 10, FSRS = 11, FSRC = 12,
        AVX_IFMA = 23,
    }
    /// Leaf 7, subleaf 1, EDX.
    leaf7_1_edx {
        AVX_VNNI_INT8 = 4, AVX_NE_CONVERT = 5, AVX_VNNI_INT16 = 10, PREFETCHITI = 14,
    }
    /// Leaf 7, subleaf 2, EDX.
    leaf7_2_edx {
        PSFD = 0, IPRED_CTRL = 1, RRSBA_CTRL = 2, DDPD_U = 3, BHI_CTRL = 4, MCDT_NO = 5,
    }
    /// Leaf 0Dh, subleaf 1, EAX.
    leaf_d_1_eax {
        XSAVEOPT = 0, XSAVEC = 1, XGETBV1 = 2, XSAVES = 3,
    }
    /// Leaf 8000_0001h, ECX.
    ext1_ecx {
        LAHF = 0, CMP_LEGACY = 1, SVM = 2, CR8_LEGACY = 4, ABM = 5, SSE4A = 6, MISALIGNSSE = 7, PREFETCHW = 8, OSVW = 9,
        XOP = 11, FMA4 = 16, TBM = 21, TOPOEXT = 22,
    }
    /// Leaf 8000_0001h, EDX: the bits that leaf 1 does not have.
    ext1_edx {
        SYSCALL = 11, NX = 20, MMXEXT = 22, FFXSR = 25, PAGE1GB = 26, RDTSCP = 27, LM = 29, AMD3DNOWEXT = 30, AMD3DNOW = 31,
    }
    /// Leaf 8000_0007h, EDX.
    ext7_edx {
        INVARIANT_TSC = 8,
    }
    /// Leaf 8000_0008h, EBX.
    ext8_ebx {
        CLZERO = 0, XSAVEERPTR = 2, WBNOINVD = 9, IBPB = 12, IBRS = 14, STIBP = 15, IBRS_ALWAYS_ON = 16,
        STIBP_ALWAYS_ON = 17, IBRS_PREFERRED = 18, IBRS_SAME_MODE = 19, EFER_LMSLE_MBZ = 20, SSBD = 24, SSB_NO = 26,
        PSFD = 28, BTC_NO = 29, IBPB_RET = 30,
    }
    /// Leaf 8000_000Ah, EDX.
    ext10_edx {
        TSC_RATIO = 4,
    }
    /// Leaf 8000_0021h, EAX.
    ext21_eax {
        NO_NESTED_DATA_BP = 0, WRMSR_BASE_NON_SERIALIZING = 1, LFENCE_SERIALIZING = 2, VERW_CLEAR = 5,
        NULL_SELECTOR_CLEARS_BASE = 6, AUTOMATIC_IBRS = 8, NO_SMM_CTL_MSR = 9, PREFETCHI = 20, SBPB = 27, IBPB_BRTYPE = 28,
        SRSO_NO = 29, SRSO_USER_KERNEL_NO = 30,
    }
    /// Leaf 8000_0021h, ECX.
    ext21_ecx {
        TSA_SQ_NO = 1, TSA_L1_NO = 2,
    }
    /// KVM's leaf 4000_0001h, EAX. Linux "Documentation/virt/kvm/x86/cpuid.rst".
    kvm_eax {
        CLOCKSOURCE = 0, NOP_IO_DELAY = 1, CLOCKSOURCE2 = 3, STEAL_TIME = 5, PV_EOI = 6, PV_UNHALT = 7,
        PV_SEND_IPI = 11, PV_SCHED_YIELD = 13, MSI_EXT_DEST_ID = 15, CLOCKSOURCE_STABLE = 24,
    }
}

/// First leaf of the hypervisor range that Krab uses.
pub const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
/// Leaf with the paravirtual features.
pub const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
/// EBX, ECX, EDX of the signature leaf.
pub const KVM_SIGNATURE: [u32; 3] =
    [u32::from_le_bytes(*b"KVMK"), u32::from_le_bytes(*b"VMKV"), u32::from_le_bytes(*b"M\0\0\0")];

/// Who made a CPU, as far as its CPUID behaviour goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vendor {
    /// AMD and Hygon.
    Amd,
    Intel,
    #[default]
    Other,
}

impl Vendor {
    /// From EBX, ECX and EDX of leaf 0.
    pub const fn from_leaf_0(registers: [u32; 4]) -> Self {
        let [_, ebx, ecx, edx] = registers;
        let [b, d, c] = [ebx.to_le_bytes(), edx.to_le_bytes(), ecx.to_le_bytes()];
        match (&b, &d, &c) {
            (b"Auth", b"enti", b"cAMD") | (b"Hygo", b"nGen", b"uine") => Self::Amd,
            (b"Genu", b"ineI", b"ntel") => Self::Intel,
            _ => Self::Other,
        }
    }
}
