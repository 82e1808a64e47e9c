// SPDX-License-Identifier: GPL-2.0
//! Small guests: machine code beside its host side, and a long-mode kit (page tables, GDT, IDT, reporting handlers).
//!
//! A payload is assembled into the program by `payload!` and copied to `CODE` in guest memory. The kit's handlers report
//! every exception to the host by `out PORT_EXC, al`, where the host may look at the frame and move RIP; interrupts
//! (vector 2 and 32 up) are counted in guest memory, acknowledged as `set_eoi` says, and the guest goes on.
//!
//! Guest memory of the kit, below 2 MiB: GDT 0x1000, IDT 0x2000, TSS 0x3000, stubs 0x4000, handlers 0x5000, counters
//! 0x7000, page tables 0x8000-0xffff, code 0x10000, stacks below 0x80000, data of the test from 0x100000.

use crate::harness::on_kvm;
use crate::vm::{Cpuid, Device, Exit, Ram, Vcpu, Vm};
use crate::{ioctls::*, kvm::*, sys, sys::EINTR};
use std::sync::atomic::{AtomicBool, Ordering};

/// Defines `fn $name() -> &'static [u8]`: machine code assembled for 16, 32 or 64 bits, Intel syntax. The name is
/// global to the program; it starts aligned to 256 bytes, so that `.balign` up to that works. Absolute addresses are the guest's own: use `rip`, `2f - 2b` or `CODE`.
#[macro_export]
macro_rules! payload {
    ($name:ident, $bits:literal, $($line:expr),+ $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata.payload, \"a\"",
            concat!(".globl payload_", stringify!($name), "_start"),
            concat!(".globl payload_", stringify!($name), "_end"),
            concat!(".code", $bits),
            ".balign 256",
            concat!("payload_", stringify!($name), "_start:"),
            $($line,)+
            concat!("payload_", stringify!($name), "_end:"),
            ".code64",
            ".popsection",
        );
        pub(crate) fn $name() -> &'static [u8] {
            extern "C" {
                #[link_name = concat!("payload_", stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!("payload_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: both labels are in one section of this program, in this order.
            unsafe { std::slice::from_raw_parts(&raw const START, &raw const END as usize - &raw const START as usize) }
        }
    };
}

/// A piece of a payload: the first 8259A has its vectors from 0x30, and all but the PIT's line masked.
#[macro_export]
macro_rules! pic_with_timer {
    () => {
        "mov al, 0x11
        out 0x20, al
        mov al, 0x30
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov al, 0xfe
        out 0x21, al"
    };
}

/// A piece of a payload: pin 10 of the I/O APIC is level-triggered, vector 0x48, destination 0; the 8259As, which have the same lines, are
/// masked. Afterwards RBX has the local APIC, which is on, and RDI the I/O APIC, where the pin's lower half is selected.
#[macro_export]
macro_rules! ioapic_pin_10_level {
    () => {
        "mov al, 0xff
        out 0x21, al
        out 0xa1, al
        mov rbx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov rdi, 0xfec00000
        mov dword ptr [rdi], 0x25
        mov dword ptr [rdi + 0x10], 0
        mov dword ptr [rdi], 0x24
        mov dword ptr [rdi + 0x10], 0x8048"
    };
}

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
const STUBS: u64 = 0x4000;
const HANDLERS: u64 = 0x5000;
/// 256 counters of 8 bytes, one per vector.
pub const COUNTS: u64 = 0x7000;
/// How handlers acknowledge an interrupt.
pub const EOI_MODE: u64 = 0x7800;
/// The word of KVM_FEATURE_PV_EOI for the kit's handlers.
pub const PV_EOI: u64 = 0x7808;
/// How many interrupts the handlers had to end for real with [`Eoi::Paravirtual`].
pub const REAL_ENDS: u64 = 0x7810;
pub const PML4: u64 = 0x8000;
pub const PDPT: u64 = 0x9000;
/// Four page directories: the first 4 GiB, identity-mapped with 2 MiB pages.
pub const PD: u64 = 0xa000;
/// Two spare pages for a test's own page tables.
pub const PT: u64 = 0xe000;
pub const CODE: u64 = 0x10000;
/// Initial RSP of vCPU 0; each further vCPU has its own 16 KiB below.
pub const STACK: u64 = 0x80000;
/// Memory that the kit leaves alone, up to the end of the slot.
pub const DATA: u64 = 0x10_0000;
/// An address that is mapped in the page tables and that no slot holds: MMIO.
pub const MMIO: u64 = 0xd000_0000;

pub const SEL_CODE64: u16 = 0x08;
pub const SEL_DATA: u16 = 0x10;
pub const SEL_CODE32: u16 = 0x18;
pub const SEL_CODE16: u16 = 0x20;
pub const SEL_USER_DATA: u16 = 0x2b;
pub const SEL_USER_CODE: u16 = 0x33;
pub const SEL_TSS: u16 = 0x38;

/// `out PORT_REPORT, eax`: a value for the test.
pub const PORT_REPORT: u16 = 0xef;
/// `out PORT_EXC, al`: an exception; the handlers use it.
pub const PORT_EXC: u16 = 0xee;
/// `out PORT_DONE, al`: the end.
pub const PORT_DONE: u16 = 0xed;

/// What came out of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Report(u32),
    Exception { vector: u8, error: u32, rip: u64, cr2: u64 },
    Done,
    Exit(Exit),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Eoi {
    None = 0,
    Xapic = 1,
    X2apic = 2,
    Pic = 3,
    /// By [`PV_EOI`] if the hypervisor has promised that this is enough, else in the xAPIC.
    Paravirtual = 4,
}

// Handlers. On entry the stack holds vector, error code, RIP, CS, RFLAGS, RSP, SS. Exceptions start at offset 0,
// interrupts at offset 0x80.
payload! { kit_handlers, 64,
    "out 0xee, al",
    "add rsp, 16",
    "iretq",
    ".balign 0x80, 0xcc",
    "push rax",
    "push rcx",
    "push rdx",
    "mov rcx, [rsp + 24]",
    "mov eax, 0x7000",
    "lock inc qword ptr [rax + rcx * 8]",
    "cmp rcx, 2",
    "je 5f",
    "mov eax, dword ptr [rax + 0x800]",
    "cmp eax, 1",
    "je 2f",
    "cmp eax, 2",
    "je 3f",
    "cmp eax, 3",
    "je 4f",
    "cmp eax, 4",
    "je 6f",
    "jmp 5f",
    "2: mov ecx, 0xfee000b0",
    "mov dword ptr [rcx], 0",
    "jmp 5f",
    "3: mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "jmp 5f",
    "4: mov al, 0x20",
    "out 0x20, al",
    "jmp 5f",
    "6: btr dword ptr [0x7808], 0",
    "jc 5f",
    "inc dword ptr [0x7810]",
    "jmp 2b",
    "5: pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
}

/// A VM with one vCPU and one slot at address 0.
pub struct Guest {
    // The order is the order of closing.
    pub cpu: Vcpu,
    pub vm: Vm,
    pub ram: Ram,
    pub cpuid: Cpuid,
}

/// Segment descriptors of the kit: (base, type, s, dpl, l, db, g) in KVM's form.
pub fn segment(selector: u16, type_: u8, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: (selector & 3) as u8,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

impl Guest {
    /// A VM with 4 MiB at address 0 and vCPU 0 in its reset state; `setup` runs before the vCPU is made.
    pub fn bare(setup: impl FnOnce(&Vm)) -> Guest {
        let device = Device::open();
        let vm = device.create_vm();
        setup(&vm);
        let ram = vm.add_ram(0, 0, 4 << 20);
        let cpu = vm.create_vcpu(0);
        let mut cpuid = device.supported_cpuid();
        set_apic_id(&mut cpuid, 0);
        cpu.set_cpuid(&cpuid).unwrap_or_else(|e| panic!("KVM_SET_CPUID2: {e:?}"));
        Guest { cpu, vm, ram, cpuid }
    }

    /// Real mode: `code` at 0x1000, all segment bases 0, SP 0x8000.
    pub fn real(code: &[u8]) -> Guest {
        Guest::real_with(code, |_| ())
    }

    pub fn real_with(code: &[u8], setup: impl FnOnce(&Vm)) -> Guest {
        let g = Guest::bare(setup);
        g.ram.write(0x1000, code);
        enter_real(&g.cpu, 0x1000);
        g
    }

    /// 32-bit protected mode without paging: flat segments, `code` at 0x10000, ESP 0x80000, no IDT.
    pub fn protected(code: &[u8]) -> Guest {
        Guest::protected_with(code, |_| ())
    }

    pub fn protected_with(code: &[u8], setup: impl FnOnce(&Vm)) -> Guest {
        let g = Guest::bare(setup);
        write_gdt(g.ram);
        g.ram.write(CODE, code);
        let mut s = g.cpu.sregs();
        s.cr0 |= 1;
        s.cs = segment(SEL_CODE32, 0xb, 0, 1);
        let data = segment(SEL_DATA, 3, 0, 1);
        (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
        s.gdt = kvm_dtable { base: GDT, limit: 0x7f, ..Default::default() };
        g.cpu.set_sregs(&s);
        g.cpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() });
        g
    }

    /// Long mode with the kit, without interrupt controllers.
    pub fn long(code: &[u8]) -> Guest {
        Guest::long_with(code, |_| ())
    }

    /// Long mode with the in-kernel irqchip.
    pub fn long_irqchip(code: &[u8]) -> Guest {
        Guest::long_with(code, |vm| vm.create_irqchip())
    }

    pub fn long_with(code: &[u8], setup: impl FnOnce(&Vm)) -> Guest {
        let g = Guest::bare(setup);
        write_kit(g.ram);
        g.ram.write(CODE, code);
        enter_long(&g.cpu, CODE, STACK);
        g
    }

    /// A further vCPU in long mode at `code`, with its own stack. Its code lies behind that of vCPU 0.
    pub fn add_long_vcpu(&self, id: u32, code: &[u8]) -> Vcpu {
        let cpu = self.add_vcpu(id);
        let at = CODE + 0x4000 * id as u64;
        self.ram.write(at, code);
        enter_long(&cpu, at, STACK - 0x4000 * id as u64);
        cpu
    }

    /// A further vCPU in its reset state, with the guest's CPUID.
    pub fn add_vcpu(&self, id: u32) -> Vcpu {
        let cpu = self.vm.create_vcpu(id);
        let mut cpuid = self.cpuid.clone();
        set_apic_id(&mut cpuid, id);
        cpu.set_cpuid(&cpuid).expect("KVM_SET_CPUID2");
        cpu
    }

    /// Runs `work` while the guest runs in another thread. MMIO is answered with zeros.
    pub fn while_running(&self, work: impl FnOnce()) {
        let cpu = &self.cpu;
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            let (send, receive) = std::sync::mpsc::channel();
            let stop = &stop;
            let t = s.spawn(move || {
                send.send(sys::gettid()).expect("the test waits");
                while !stop.load(Ordering::Relaxed) {
                    match cpu.run() {
                        Ok(Exit::Mmio { write: false, .. }) => cpu.reply(&[0; 8]),
                        Ok(Exit::Mmio { .. }) | Err(EINTR) => {}
                        other => panic!("{other:x?}"),
                    }
                }
            });
            let tid = receive.recv().expect("the thread runs");
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            stop.store(true, Ordering::Relaxed);
            while !t.is_finished() {
                cpu.set_immediate_exit(true);
                sys::kick(tid);
                sys::sleep_ms(1);
            }
            assert!(t.join().is_ok(), "the vCPU's thread failed");
            cpu.set_immediate_exit(false);
            if let Err(p) = result {
                std::panic::resume_unwind(p);
            }
        });
    }

    /// CPUID shows the local APIC's TSC deadline, which KVM_GET_SUPPORTED_CPUID leaves to userspace.
    pub fn show_tsc_deadline(&self) {
        const TSC_DEADLINE: u32 = 1 << 24;
        let mut cpuid = self.cpuid.clone();
        let n = cpuid.nent as usize;
        cpuid.entries[..n].iter_mut().filter(|e| e.function == 1).for_each(|e| e.ecx |= TSC_DEADLINE);
        self.cpu.set_cpuid(&cpuid).expect("KVM_SET_CPUID2");
    }

    pub fn set_eoi(&self, mode: Eoi) {
        self.ram.write_u64(EOI_MODE, mode as u64);
    }

    /// Interrupts taken on `vector` so far.
    pub fn count(&self, vector: u8) -> u64 {
        self.ram.read_u64(COUNTS + vector as u64 * 8)
    }

    /// Runs to the next event.
    pub fn event(&self) -> Event {
        event(&self.cpu, self.ram)
    }

    /// Runs to the next event, which is this one.
    #[track_caller]
    pub fn expect(&self, want: Event) {
        let got = self.event();
        assert!(got == want, "wanted {want:x?}, got {got:x?} at rip {:#x}", self.cpu.regs().rip);
    }

    #[track_caller]
    pub fn expect_done(&self) {
        self.expect(Event::Done);
    }

    /// Runs to a report and gives the value.
    #[track_caller]
    pub fn report(&self) -> u32 {
        match self.event() {
            Event::Report(v) => v,
            other => panic!("wanted a report, got {other:x?} at rip {:#x}", self.cpu.regs().rip),
        }
    }

    /// Runs to an exception: vector and error code. The guest goes on behind the `len` bytes of the instruction.
    #[track_caller]
    pub fn exception(&self, len: u64) -> (u8, u32) {
        match self.event() {
            Event::Exception { vector, error, rip, .. } => {
                self.set_frame_rip(rip + len);
                (vector, error)
            }
            other => panic!("wanted an exception, got {other:x?} at rip {:#x}", self.cpu.regs().rip),
        }
    }

    /// In an exception event: where the guest goes on.
    pub fn set_frame_rip(&self, rip: u64) {
        self.ram.write_u64(self.cpu.regs().rsp + 16, rip);
    }
}

/// XMM0-15, by KVM_SET_XSAVE, with the x87 and SSE bits of XSTATE_BV set.
pub fn set_xmm(cpu: &Vcpu, xmm: &[[u8; 16]; 16]) {
    let mut x: kvm_xsave = cpu.get(KVM_GET_XSAVE).expect("KVM_GET_XSAVE");
    for (i, word) in xmm.as_flattened().chunks_exact(4).enumerate() {
        x.region[40 + i] = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    }
    // FCW of an x87 unit that is in use
    x.region[0] = x.region[0] & !0xffff | 0x37f;
    x.region[128] |= 3;
    cpu.set(KVM_SET_XSAVE, &x).expect("KVM_SET_XSAVE");
}

/// After KVM_EXIT_SHUTDOWN: makes the vCPU fit for a new start by KVM_SET_SREGS.
///
/// KVM on AMD clears its VMCB then, and sets the nested CR3 in it again only when the new state asks for another MMU
/// context: a guest that shut down in real mode and starts in real mode would walk page tables at address 0 for ever.
/// Protected mode in between makes it load the root again.
pub fn recover_from_shutdown(cpu: &Vcpu) {
    let mut s = cpu.sregs();
    // KVM on Intel leaves the state of before the shutdown.
    if !on_kvm() || s.cr0 & 1 != 0 {
        return;
    }
    s.cr0 ^= 1;
    cpu.set_sregs(&s);
}

fn event(cpu: &Vcpu, ram: Ram) -> Event {
    let exit = loop {
        match cpu.run() {
            Err(sys::EINTR) => continue,
            Err(e) => panic!("KVM_RUN: {e:?} at rip {:#x}", cpu.regs().rip),
            Ok(exit) => break exit,
        }
    };
    match &exit {
        Exit::Io { out: true, port: PORT_REPORT, size: 4, count: 1, data } => {
            Event::Report(u32::from_le_bytes([data[0], data[1], data[2], data[3]]))
        }
        Exit::Io { out: true, port: PORT_DONE, .. } => Event::Done,
        Exit::Io { out: true, port: PORT_EXC, .. } => {
            let rsp = cpu.regs().rsp;
            Event::Exception {
                vector: ram.read_u64(rsp) as u8,
                error: ram.read_u64(rsp + 8) as u32,
                rip: ram.read_u64(rsp + 16),
                cr2: cpu.sregs().cr2,
            }
        }
        _ => Event::Exit(exit),
    }
}

/// Runs a vCPU other than the guest's first to its next event.
pub fn event_of(cpu: &Vcpu, ram: Ram) -> Event {
    event(cpu, ram)
}

pub fn set_apic_id(cpuid: &mut Cpuid, id: u32) {
    let n = cpuid.nent as usize;
    for e in &mut cpuid.entries[..n] {
        match e.function {
            1 => e.ebx = e.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => e.edx = id,
            0x8000_001e => e.eax = id,
            _ => {}
        }
    }
}

/// Real mode with all segment bases 0.
pub fn enter_real(cpu: &Vcpu, ip: u64) {
    let mut s = cpu.sregs();
    s.cs.base = 0;
    s.cs.selector = 0;
    cpu.set_sregs(&s);
    cpu.set_regs(&kvm_regs { rip: ip, rsp: 0x8000, rflags: 2, ..Default::default() });
}

/// Long mode on the kit's tables.
pub fn enter_long(cpu: &Vcpu, rip: u64, rsp: u64) {
    let mut s = cpu.sregs();
    s.cs = segment(SEL_CODE64, 0xb, 1, 0);
    let data = segment(SEL_DATA, 3, 0, 1);
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    s.tr = kvm_segment { base: TSS, limit: 0x67, selector: SEL_TSS, type_: 0xb, present: 1, ..Default::default() };
    s.gdt = kvm_dtable { base: GDT, limit: 0x7f, ..Default::default() };
    s.idt = kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() };
    s.cr0 = 0x8000_0033; // PG NE ET MP PE
    s.cr3 = PML4;
    s.cr4 = 0x620; // PAE OSFXSR OSXMMEXCPT
    s.efer = 0x501; // LMA LME SCE
    cpu.set_sregs(&s);
    cpu.set_regs(&kvm_regs { rip, rsp, rflags: 2, ..Default::default() });
}

fn write_gdt(ram: Ram) {
    let d: [u64; 9] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x000f_9b00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16,
        0,
    ];
    for (i, d) in d.iter().enumerate() {
        ram.write_u64(GDT + i as u64 * 8, *d);
    }
}

/// Writes the kit (tables, stubs, handlers) into the low 1 MiB of `ram`, which begins at address 0.
pub fn write_kit(ram: Ram) {
    write_gdt(ram);
    ram.write(HANDLERS, kit_handlers());
    for v in 0..256u64 {
        // push 0 where the CPU pushes no error code; push vector; jmp handler
        let stub = STUBS + v * 16;
        let mut code = Vec::new();
        if !matches!(v, 8 | 10..=14 | 17 | 21 | 29 | 30) {
            code.extend([0x6a, 0]);
        }
        code.push(0x68);
        code.extend((v as u32).to_le_bytes());
        let to = if v >= 32 || v == 2 { HANDLERS + 0x80 } else { HANDLERS };
        code.push(0xe9);
        code.extend((to.wrapping_sub(stub + code.len() as u64 + 4) as u32).to_le_bytes());
        ram.write(stub, &code);
        // 64-bit interrupt gate, present; vector 3 from user mode as well
        let dpl = if v == 3 || v == 0x80 { 0xee } else { 0x8e };
        ram.write_u64(IDT + v * 16, stub & 0xffff | (SEL_CODE64 as u64) << 16 | dpl << 40 | (stub >> 16) << 48);
        ram.write_u64(IDT + v * 16 + 8, 0);
    }
    ram.write_u64(TSS + 4, 0x9_0000);
    // The I/O permission map begins beyond the limit: no port for user mode.
    ram.write(TSS + 0x66, &0x68u16.to_le_bytes());
    ram.write_u64(PML4, PDPT | 7);
    for i in 0..4 {
        ram.write_u64(PDPT + i * 8, (PD + i * 0x1000) | 7);
        for j in 0..512 {
            ram.write_u64(PD + i * 0x1000 + j * 8, (i << 30 | j << 21) | 0xe7);
        }
    }
}

/// Maps the 2 MiB that hold the kit and the test's code through the spare page table, so that a test may give single
/// pages other rights. Returns the address of the entry for `gva`.
pub fn split_first_2m(ram: Ram) -> impl Fn(u64) -> u64 {
    for i in 0..512 {
        ram.write_u64(PT + i * 8, i << 12 | 0x67);
    }
    ram.write_u64(PD, PT | 7);
    |gva| {
        assert!(gva < 2 << 20);
        PT + (gva >> 12) * 8
    }
}
