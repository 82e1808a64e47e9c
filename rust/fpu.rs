// SPDX-License-Identifier: GPL-2.0
//! Guest extended state: x87, SSE, AVX and what else XSAVE manages, DR0 to DR3 and TSC_AUX.
//!
//! A [`Window`] is a stretch of kernel code with interrupts off in which this CPU holds the guest's extended state. A guest has no
//! supervisor states: its XSS is 0, and while it can execute XSAVES the CPU's is, too.
use core::marker::PhantomData;

use kernel::prelude::*;

use super::{
    bindings,
    cpu::{self, IrqsOff},
};
use crate::{
    arch::{cpuid::leaf_d_1_eax, cr::xcr0, msr},
    emul::X87Words,
};

/// The largest XSAVE image, in bytes, that a guest's area holds.
pub(crate) const AREA_BYTES: usize = 4096 * 3;

/// Where XMM0 is in the image, and the upper half of YMM0: the same on every CPU. SDM Vol. 1 "XSAVE Area".
const XMM_OFFSET: usize = 160;
const YMM_HIGH_OFFSET: usize = 576;

#[derive(Zeroable)]
#[repr(C, align(4096))]
struct Area([u8; AREA_BYTES]);

/// A guest's extended state, in XSAVE's standard (not compacted) format.
///
/// # Invariants
///
/// `area` is 64-byte aligned and as large as XSAVE needs for `supported`, which is the host's XCR0.
pub(crate) struct GuestFpu {
    area: KBox<Area>,
    supported: u64,
    xcr0: u64,
    has_pku: bool,
    /// The host's XSS, the same at all times and on all CPUs; 0 without XSAVES.
    host_xss: u64,
    /// The guest's TSC_AUX, if it has one.
    pub(crate) tsc_aux: Option<u64>,
    /// The guest's DR0 to DR3.
    pub(crate) breakpoints: [u64; 4],
    /// Whether the guest's DR7 enables any of them.
    pub(crate) breakpoints_enabled: bool,
}

impl GuestFpu {
    /// Reset state. Fails like [`host_components`].
    pub(crate) fn new() -> Result<Self> {
        let mut fpu = Self {
            area: KBox::zeroed(GFP_KERNEL_ACCOUNT)?,
            supported: host_components()?,
            xcr0: xcr0::X87,
            has_pku: cpu::host_features().pku,
            host_xss: if cpu::cpuid(0xD, 1)[0] & leaf_d_1_eax::XSAVES != 0 { cpu::read_msr(msr::XSS)? } else { 0 },
            tsc_aux: None,
            breakpoints: [0; 4],
            breakpoints_enabled: false,
        };
        fpu.reset();
        Ok(fpu)
    }

    /// Extended state as after reset: FCW 040h, MXCSR 1F80h, every other component in its initial state. XCR0 is 1.
    pub(crate) fn reset(&mut self) {
        self.area.0.fill(0);
        self.area.0[0..2].copy_from_slice(&0x40u16.to_le_bytes());
        self.area.0[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
        // XSTATE_BV: x87 and SSE come from the image, the rest is initial.
        self.area.0[512..520].copy_from_slice(&(xcr0::X87 | xcr0::SSE).to_le_bytes());
        self.xcr0 = xcr0::X87;
    }

    /// The guest's XCR0.
    pub(crate) fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Sets the guest's XCR0; the CPU must accept the combination. `EINVAL` for a component that the host does not manage.
    pub(crate) fn set_xcr0(&mut self, value: u64) -> Result {
        if value & !self.supported != 0 || value & xcr0::X87 == 0 {
            return Err(EINVAL);
        }
        self.xcr0 = value;
        Ok(())
    }

    /// The XSAVE image. Its first 512 bytes are FXSAVE's, then comes the 64-byte header.
    pub(crate) fn image(&self) -> &[u8] {
        &self.area.0
    }

    /// YMM register `number`, 0 to 15, as the guest has it. The state is not loaded now: no window is open.
    pub(crate) fn vector(&self, number: usize) -> [u8; 32] {
        let mut value = [0; 32];
        let (low, high) = value.split_at_mut(16);
        for (component, half, offset) in [(xcr0::SSE, low, XMM_OFFSET), (xcr0::AVX, high, YMM_HIGH_OFFSET)] {
            let at = offset + number % 16 * 16;
            if self.components() & component != 0 {
                half.copy_from_slice(&self.area.0[at..at + 16]);
            }
        }
        value
    }

    /// Writes the low 16 bytes of YMM register `number`, and with `vex` the high ones too.
    pub(crate) fn set_vector(&mut self, number: usize, value: &[u8; 32], vex: bool) {
        let (low, high) = value.split_at(16);
        for (component, half, offset, wanted) in
            [(xcr0::SSE, low, XMM_OFFSET, true), (xcr0::AVX, high, YMM_HIGH_OFFSET, vex)]
        {
            if !wanted || self.supported & component == 0 {
                continue;
            }
            let components = self.components();
            if components & component == 0 {
                // The component was in its initial state: all of it becomes explicit.
                self.area.0[offset..offset + 256].fill(0);
                self.area.0[512..520].copy_from_slice(&(components | component).to_le_bytes());
            }
            let at = offset + number % 16 * 16;
            self.area.0[at..at + 16].copy_from_slice(half);
        }
    }

    /// The guest's x87 control and status words.
    pub(crate) fn x87_words(&self) -> X87Words {
        let word = |at: usize| u16::from_le_bytes([self.area.0[at], self.area.0[at + 1]]);
        match self.components() & xcr0::X87 {
            0 => X87Words::INITIAL,
            _ => X87Words { control: word(0), status: word(2) },
        }
    }

    /// FNINIT: the registers keep their contents, and are empty.
    pub(crate) fn initialize_x87(&mut self) {
        if self.components() & xcr0::X87 != 0 {
            // Control, status, tags, opcode, and the last instruction's addresses.
            self.area.0[..24].fill(0);
            self.area.0[..2].copy_from_slice(&X87Words::INITIAL.control.to_le_bytes());
        }
    }

    /// The guest's protection-key rights.
    pub(crate) fn pkru(&self) -> u32 {
        if !self.has_pku || self.components() & xcr0::PKRU == 0 {
            return 0;
        }
        let at = cpu::cpuid(0xD, 9)[1] as usize;
        word_at(&self.area.0, at).unwrap_or(0) as u32
    }

    /// XSTATE_BV of the image.
    fn components(&self) -> u64 {
        word_at(&self.area.0, 512).unwrap_or(0)
    }

    /// Replaces the start of the XSAVE image. `EINVAL` when XRSTOR would refuse it; then nothing changes.
    pub(crate) fn set_image(&mut self, image: &[u8]) -> Result {
        let [components, compacted, mxcsr] = [512, 520, 24].map(|at| word_at(image, at));
        let (Some(components), Some(compacted), Some(mxcsr)) = (components, compacted, mxcsr) else {
            return Err(EINVAL);
        };
        let reserved = image.get(528..576).is_none_or(|bytes| bytes.iter().any(|&b| b != 0));
        let Some(area) = self.area.0.get_mut(..image.len()) else { return Err(EINVAL) };
        // MXCSR's mask of usable bits is 0FFFFh on every CPU with XSAVE, or 2FFFFh with misaligned SSE.
        if components & !self.supported != 0 || compacted != 0 || reserved || mxcsr as u32 & !0x2_FFFF != 0 {
            return Err(EINVAL);
        }
        area.copy_from_slice(image);
        Ok(())
    }

    /// Loads the guest's state into this CPU until the window is dropped.
    #[inline]
    pub(crate) fn enter<'a>(&'a mut self, _irqs: &'a IrqsOff) -> Window<'a> {
        // SAFETY: interrupts are off until `Window`'s drop, which is the counterpart.
        unsafe { bindings::krab_fpu_begin() };
        let host_pkru = if self.has_pku {
            // SAFETY: the host has PKU on.
            unsafe { bindings::krab_read_pkru() }
        } else {
            0
        };
        // SAFETY: by the type's invariant the area is fit for XRSTOR with this mask. An image that the CPU refuses is caught by the
        // exception table, and then no state of the guest is in the registers: FXRSTOR defaults from `reset` replace it.
        if unsafe { bindings::krab_xrstor(self.area.0.as_ptr().cast(), self.supported) } != 0 {
            let xcr0 = self.xcr0;
            self.reset();
            self.xcr0 = xcr0;
            // SAFETY: as above; the reset image is valid.
            unsafe { bindings::krab_xrstor(self.area.0.as_ptr().cast(), self.supported) };
        }
        if self.xcr0 != self.supported {
            // SAFETY: `set_xcr0` lets only architectural values through; the kernel does not use XSAVE in this window.
            unsafe { bindings::krab_xsetbv(self.xcr0) };
        }
        if self.host_xss != 0 {
            // SAFETY: as for XCR0: nothing executes XSAVES or XRSTORS on this CPU before the drop restores it.
            let _ = unsafe { cpu::write_msr(msr::XSS, 0) };
        }
        let host_tsc_aux = self.tsc_aux.map(|guest| {
            let host = host_tsc_aux();
            if host != guest {
                // SAFETY: only user code reads TSC_AUX, and none runs on this CPU before the drop restores it.
                let _ = unsafe { cpu::write_msr(msr::TSC_AUX, guest) };
            }
            host
        });
        if self.breakpoints_enabled {
            // SAFETY: DR7 enables the host's own in the kernel only around hardware breakpoints, restored by the drop.
            unsafe { bindings::krab_swap_debug_registers(self.breakpoints.as_mut_ptr()) };
        }
        Window { fpu: self, host_pkru, host_tsc_aux, irqs: PhantomData }
    }
}

/// Proof that the guest's extended state is loaded. Interrupts are off.
pub(crate) struct Window<'a> {
    fpu: &'a mut GuestFpu,
    host_pkru: u32,
    host_tsc_aux: Option<u64>,
    irqs: PhantomData<&'a IrqsOff>,
}

impl Window<'_> {
    /// The guest's XCR0 while its state is loaded.
    pub(crate) fn xcr0(&self) -> u64 {
        self.fpu.xcr0
    }
}

impl Drop for Window<'_> {
    #[inline]
    fn drop(&mut self) {
        let fpu = &mut *self.fpu;
        // VMRUN leaves DR7 with every breakpoint off.
        // SAFETY: a per-CPU read; interrupts are off in the window.
        let host_dr7 = unsafe { bindings::krab_host_dr7() };
        if fpu.breakpoints_enabled {
            // SAFETY: gives the host its registers back and keeps the guest's.
            unsafe { bindings::krab_swap_debug_registers(fpu.breakpoints.as_mut_ptr()) };
        }
        if host_dr7 != 0 {
            // SAFETY: what the kernel itself had in DR7.
            unsafe { bindings::krab_write_dr7(host_dr7) };
        }
        if let (Some(guest), Some(host)) = (fpu.tsc_aux, self.host_tsc_aux) {
            if guest != host {
                // SAFETY: the value that was there before.
                let _ = unsafe { cpu::write_msr(msr::TSC_AUX, host) };
            }
        }
        if fpu.xcr0 != fpu.supported {
            // SAFETY: the host's own value.
            unsafe { bindings::krab_xsetbv(fpu.supported) };
        }
        if fpu.host_xss != 0 {
            // SAFETY: the host's own value.
            let _ = unsafe { cpu::write_msr(msr::XSS, fpu.host_xss) };
        }
        // SAFETY: by the type's invariant the area is large enough for this mask.
        unsafe { bindings::krab_xsave(fpu.area.0.as_mut_ptr().cast(), fpu.supported) };
        if fpu.has_pku {
            // SAFETY: the host has PKU on; this is its own value.
            unsafe { bindings::krab_write_pkru(self.host_pkru) };
        }
        // SAFETY: the counterpart of `enter`.
        unsafe { bindings::krab_fpu_end() };
    }
}

/// State components that the host manages: its XCR0. `ENOTSUPP` without XSAVE or when their image is larger than [`AREA_BYTES`].
pub(crate) fn host_components() -> Result<u64> {
    // CPUID.0Dh.0:EBX is the size for what XCR0 has on now.
    if !cpu::host_features().xsave || cpu::cpuid(0xD, 0)[1] as usize > AREA_BYTES {
        return Err(ENOTSUPP);
    }
    // SAFETY: the CPU has XSAVE and the kernel enabled it.
    Ok(unsafe { bindings::krab_xgetbv() })
}

/// Eight bytes of an XSAVE image.
pub(crate) fn word_at(image: &[u8], at: usize) -> Option<u64> {
    image.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// TSC_AUX of this CPU, by RDTSCP: no MSR access.
#[inline]
fn host_tsc_aux() -> u64 {
    let aux: u32;
    // SAFETY: a guest has TSC_AUX only where the host has RDTSCP.
    unsafe { core::arch::asm!("rdtscp", out("ecx") aux, out("eax") _, out("edx") _, options(nomem, nostack)) };
    aux.into()
}
