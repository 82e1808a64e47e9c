// SPDX-License-Identifier: GPL-2.0
//! What a big client such as QEMU asks for: the split irqchip, coalesced writes, the dirty log with manual protection, the
//! boot CPU, the page for the task priority, and capabilities that are turned on.

use krabtest::guest::*;
use krabtest::harness::{on_kvm, options};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::routing::Routing;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Ram, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

use super::irqchip::APIC;

tests! { "client";
    enable_cap_errors;
    split_irqchip_errors;
    split_level_interrupt_ends_in_userspace;
    split_external_interrupt;
    pit_ticks_at_a_routed_pin;
    coalesced_writes;
    coalesced_ring_full;
    moves_of_all_forms;
    coalesced_errors;
    dirty_log_cleared_by_hand;
    dirty_log_clear_errors;
    boot_cpu;
    task_priority_page;
    task_priority_reports;
    many_scattered_slots(60);
    msr_filter;
    msr_filter_while_vcpus_are_made;
}

fn enable(vm: &Vm, cap: u32, argument: u64) -> Result<i32> {
    let mut e = kvm_enable_cap { cap, ..Default::default() };
    e.args[0] = argument;
    vm.set(KVM_ENABLE_CAP, &e)
}

fn enable_cap_errors() {
    let vm = Vm::new();
    assert_err!(enable(&vm, 0xFFFF, 0), EINVAL, "a capability that does not exist");
    assert_err!(enable(&vm, KVM_CAP_USER_MEMORY, 0), EINVAL, "one that is always on");
    let flags = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, flags: 1, ..Default::default() };
    assert_err!(vm.set(KVM_ENABLE_CAP, &flags), EINVAL, "flags");
    assert_err!(enable(&vm, KVM_CAP_X2APIC_API, 1 << 40), EINVAL, "unknown flags of the x2APIC interface");
    assert_err!(enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 2), EINVAL, "initially set alone");
    assert_err!(enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 4), EINVAL, "unknown flags of the dirty log");
    assert_ok!(enable(&vm, KVM_CAP_X2APIC_API, 3));
    assert_ok!(enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3));
    assert_ok!(enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0));
    assert_err!(vm.ioctl(KVM_ENABLE_CAP, 8), EFAULT);
    let cpu = vm.create_vcpu(0);
    let none = kvm_enable_cap { cap: 0xFFFF, ..Default::default() };
    assert_err!(cpu.set(KVM_ENABLE_CAP, &none), EINVAL, "on a vCPU");
}

fn split_irqchip_errors() {
    let vm = Vm::new();
    assert_err!(enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 4097), EINVAL, "pins");
    assert_ok!(enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 24));
    assert_err!(enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 24), EEXIST, "twice");
    assert_err!(vm.ioctl(KVM_CREATE_IRQCHIP, 0), EEXIST, "the whole irqchip after it");
    assert_err!(vm.set(KVM_CREATE_PIT2, &kvm_pit_config::default()), ENOENT, "a PIT");
    let mut chip = kvm_irqchip::default();
    assert_err!(sys::ioctl_out(vm.fd, KVM_GET_IRQCHIP, &mut chip), ENXIO, "there is no PIC");
    assert_err!(Routing::new().chip(4, KVM_IRQCHIP_IOAPIC, 4).set(&vm), EINVAL, "a route to a pin");
    assert_ok!(Routing::new().msi(4, APIC, 0x41).set(&vm));
    let vm = Vm::new();
    vm.create_irqchip();
    assert_err!(enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 24), EEXIST, "beside the whole irqchip");
    let vm = Vm::new();
    let _cpu = vm.create_vcpu(0);
    assert_err!(enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 24), EEXIST, "after a vCPU");
}

fn split(code: &'static [u8]) -> Guest {
    Guest::long_with(code, |vm| {
        let _ = vm.ioctl(KVM_SET_TSS_ADDR, 0xfffb_d000);
        assert_ok!(enable(vm, KVM_CAP_SPLIT_IRQCHIP, 24));
    })
}

payload! { client_spin, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "out 0xed, al",
    "2: nop",
    "out 0xed, al",
    "jmp 2b",
}

fn split_level_interrupt_ends_in_userspace() {
    let g = split(client_spin());
    g.set_eoi(Eoi::Xapic);
    // GSI 5 is level-triggered, 6 is not; 30 is level-triggered but no pin of userspace's I/O APIC.
    assert_ok!(Routing::new().msi(5, APIC, 0x8051).msi(6, APIC, 0x52).msi(30, APIC, 0x8053).set(&g.vm));
    g.expect_done();
    assert_ok!(g.vm.irq_line(6, 1));
    assert_ok!(g.vm.irq_line(30, 1));
    g.expect_done();
    g.expect_done();
    assert_eq!([0x51, 0x52, 0x53].map(|v| g.count(v)), [0, 1, 1]);
    for round in 1..4 {
        assert_ok!(g.vm.irq_line(5, 1));
        g.expect(Event::Exit(Exit::Eoi(0x51)));
        g.expect_done();
        assert_eq!(g.count(0x51), round);
    }
}

fn split_external_interrupt() {
    let g = split(client_spin());
    // LINT0 passes on what comes from the 8259A.
    let mut lapic = kvm_lapic_state::default();
    assert_ok!(sys::ioctl_out(g.cpu.fd, KVM_GET_LAPIC, &mut lapic));
    let lint0 = u32::from_le_bytes([0x350, 0x351, 0x352, 0x353].map(|at| lapic.regs[at] as u8));
    assert_eq!(lint0 & 0x1_0700, 0x700, "LINT0 of the boot CPU");
    g.expect_done();
    g.cpu.page().request_interrupt_window = 1;
    assert_eq!(assert_ok!(g.cpu.run()), Exit::IrqWindow);
    assert_eq!(g.cpu.page().ready_for_interrupt_injection, 1);
    assert_err!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 256 }), EINVAL);
    assert_ok!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x45 }));
    assert_err!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x46 }), EEXIST, "one waits already");
    g.cpu.page().request_interrupt_window = 0;
    g.expect_done();
    g.expect_done();
    assert_eq!((g.count(0x45), g.count(0x46)), (1, 0));
    // With LINT0 masked nothing of the 8259A goes in, and the guest is not stopped for it.
    lapic.regs[0x352] |= 1;
    assert_ok!(g.cpu.set(KVM_SET_LAPIC, &lapic));
    g.cpu.page().request_interrupt_window = 1;
    g.expect_done();
    g.expect_done();
    assert_eq!(g.cpu.page().ready_for_interrupt_injection, 0);
}

payload! { client_pit, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov rcx, 0xfec00000",
    "mov dword ptr [rcx], 0x14",        // pin 2: vector 0x30
    "mov dword ptr [rcx + 0x10], 0x30",
    "mov al, 0xff",
    "out 0x21, al",
    "mov al, 0x34",         // channel 0, both bytes, mode 2
    "out 0x43, al",
    "mov al, 0x54",
    "out 0x40, al",
    "mov al, 0x17",         // 5972 ticks, about 5 ms
    "out 0x40, al",
    "sti",
    "2: cmp qword ptr [0x7180], 8",
    "jae 3f",
    "hlt",
    "jmp 2b",
    "3: cli",
    "out 0xed, al",
}

/// Boards wire the PIT to pin 2. A tick is acknowledged there; otherwise none follows the first.
fn pit_ticks_at_a_routed_pin() {
    let g = Guest::long_with(client_pit(), |vm| {
        vm.create_irqchip();
        vm.create_pit();
    });
    assert_ok!(Routing::new().chip(0, KVM_IRQCHIP_IOAPIC, 2).set(&g.vm));
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert!(g.count(0x30) >= 8);
}

/// The ring of coalesced writes, in the vCPU's mapping.
struct Ring(*mut u8);

impl Ring {
    fn of(g: &Guest) -> Ring {
        let page = assert_ok!(u32::try_from(g.vm.cap(KVM_CAP_COALESCED_MMIO)).map_err(|_| EINVAL));
        assert!(page > 0 && g.cpu.run_size >= (page as usize + 1) * 4096);
        Ring((g.cpu.page() as *mut kvm_run).cast::<u8>().wrapping_add(page as usize * 4096))
    }

    fn word(&self, at: usize) -> u32 {
        // SAFETY: within the mapped page.
        unsafe { self.0.add(at).cast::<u32>().read_volatile() }
    }

    fn set(&self, at: usize, value: u32) {
        // SAFETY: within the mapped page.
        unsafe { self.0.add(at).cast::<u32>().write_volatile(value) }
    }

    /// Takes all entries out: (address, length, pio, low half of the data).
    fn take(&self) -> Vec<(u64, u32, u32, u32)> {
        let (mut first, last) = (self.word(0), self.word(4));
        let mut entries = Vec::new();
        while first != last {
            let at = 8 + first as usize * 24;
            let address = u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
            entries.push((address, self.word(at + 8), self.word(at + 12), self.word(at + 16)));
            first = (first + 1) % ENTRIES;
        }
        self.set(0, first);
        entries
    }
}

const ENTRIES: u32 = (4096 - 8) / 24;

fn zone(vm: &Vm, nr: u32, addr: u64, size: u32, pio: u32) -> Result<i32> {
    let zone = kvm_coalesced_mmio_zone { addr, size, __bindgen_anon_1: kvm_coalesced_mmio_zone__bindgen_ty_1 { pio } };
    vm.set(nr, &zone)
}

payload! { client_writes, 64,
    "mov rbx, 0xd0000000",
    "2: mov dword ptr [rbx], 0x11",
    "mov byte ptr [rbx + 7], 0x22",
    "mov eax, 0x3344",
    "out 0x90, ax",
    "mov dword ptr [rbx + 6], 0x55",    // leaves the zone
    "mov eax, [rbx]",                   // reads are never coalesced
    "out 0xed, al",
    "jmp 2b",
}

fn coalesced_writes() {
    let g = Guest::long(client_writes());
    let ring = Ring::of(&g);
    assert_ok!(zone(&g.vm, KVM_REGISTER_COALESCED_MMIO, MMIO, 8, 0));
    assert_ok!(zone(&g.vm, KVM_REGISTER_COALESCED_MMIO, 0x90, 2, 1));
    g.expect(Event::Exit(Exit::Mmio { write: true, gpa: MMIO + 6, len: 4, data: vec![0x55, 0, 0, 0] }));
    assert_eq!(ring.take(), [(MMIO, 4, 0, 0x11), (MMIO + 7, 1, 0, 0x22), (0x90, 2, 1, 0x3344)]);
    assert!(matches!(g.event(), Event::Exit(Exit::Mmio { write: false, gpa: MMIO, .. })));
    g.expect_done();
    // Without the zones userspace sees each write.
    assert_ok!(zone(&g.vm, KVM_UNREGISTER_COALESCED_MMIO, MMIO, 8, 0));
    assert_ok!(zone(&g.vm, KVM_UNREGISTER_COALESCED_MMIO, 0x90, 2, 1));
    g.expect(Event::Exit(Exit::Mmio { write: true, gpa: MMIO, len: 4, data: vec![0x11, 0, 0, 0] }));
    assert_eq!(ring.take(), []);
}

payload! { client_many_writes, 64,
    "mov rbx, 0xd0000000",
    "xor eax, eax",
    "2: mov dword ptr [rbx], eax",
    "inc eax",
    "jmp 2b",
}

fn coalesced_ring_full() {
    let g = Guest::long(client_many_writes());
    let ring = Ring::of(&g);
    assert_ok!(zone(&g.vm, KVM_REGISTER_COALESCED_MMIO, MMIO, 4, 0));
    let full = ENTRIES - 1;
    g.expect(Event::Exit(Exit::Mmio { write: true, gpa: MMIO, len: 4, data: full.to_le_bytes().to_vec() }));
    let entries = ring.take();
    assert_eq!(entries.iter().map(|e| e.3).collect::<Vec<_>>(), (0..full).collect::<Vec<_>>());
    // Nonsense in the indices does no harm.
    for (first, last) in [(0, u32::MAX), (5, ENTRIES), (u32::MAX, u32::MAX)] {
        ring.set(0, first);
        ring.set(4, last);
        assert!(matches!(g.event(), Event::Exit(Exit::Mmio { write: true, .. })));
    }
}

payload! { client_forms, 64,
    "mov rbx, 0xd0000000",
    "mov rdi, 0xfee00030",
    "mov rax, 0x1122334455667788",
    "mov rdx, 0x99aabbccddeeff00",
    "mov r15d, 0xcafe",
    "mov esi, 1",
    "2: mov [rbx], eax",
    "mov [rbx + 8], al",
    "mov [rbx + 0x10], ah",
    "mov [rbx + 0x18], dx",
    "mov [rbx + 0x20], rax",
    "mov dword ptr [rbx + 8 * rsi + 0x20], 0x12345678",
    "mov byte ptr [rbx + 0x30], 0x5a",
    "mov qword ptr [rbx + 0x38], -2",
    "mov [rbx + 0x40], sil",
    "mov r14, rsp",
    "mov esp, 0x7654",
    "mov [rbx + 0x48], esp",
    "mov rsp, rbx",
    "mov [rsp + 0x50], r15w",
    "mov rsp, r14",
    "mov word ptr [rbx + 0x58], 0xbeef",
    "mov [ebx + 0x60], eax",
    "mov ecx, 2",
    "mov r12, rdi",
    "lea rdi, [rbx + 0x68]",
    "rep stosd",
    "mov rdi, r12",
    "movnti [rbx + 0x78], eax",
    // The local APIC's version, which does not change.
    "mov r8, -1",
    "mov r8d, [rdi]",
    "mov [0x100000], r8",
    "mov r8, -1",
    "mov r8b, [rdi]",
    "mov [0x100008], r8",
    "mov r8, -1",
    "mov r8w, [rdi]",
    "mov [0x100010], r8",
    "mov r8, -1",
    "movzx r8d, byte ptr [rdi]",
    "mov [0x100018], r8",
    "mov r8, -1",
    "movzx r8, word ptr [rdi]",
    "mov [0x100020], r8",
    "mov r8, -1",
    "movsx r8, byte ptr [rdi]",
    "mov [0x100028], r8",
    "mov rcx, -1",
    "mov ch, [rdi]",
    "mov [0x100030], rcx",
    "out 0xed, al",
    "jmp 2b",
}

/// The same instructions again and again, at devices that need no userspace: one way or another the hypervisor does each of them right.
fn moves_of_all_forms() {
    let g = Guest::long_irqchip(client_forms());
    let ring = Ring::of(&g);
    assert_ok!(zone(&g.vm, KVM_REGISTER_COALESCED_MMIO, MMIO, 4096, 0));
    let low = 0x5566_7788;
    let wanted = [
        (0, 4, low),
        (8, 1, 0x88),
        (0x10, 1, 0x77),
        (0x18, 2, 0xff00),
        (0x20, 8, low),
        (0x28, 4, 0x1234_5678),
        (0x30, 1, 0x5a),
        (0x38, 8, 0xffff_fffe),
        (0x40, 1, 1),
        (0x48, 4, 0x7654),
        (0x50, 2, 0xcafe),
        (0x58, 2, 0xbeef),
        (0x60, 4, low),
        (0x68, 4, low),
        (0x6c, 4, low),
        (0x78, 4, low),
    ]
    .map(|(offset, len, data)| (MMIO + offset, len, 0, data));
    for round in 0..4 {
        g.expect_done();
        assert_eq!(ring.take(), wanted, "round {round}");
        let read = |n: u64| g.ram.read_u64(DATA + 8 * n);
        let version = read(0);
        assert!((0x10..0x20).contains(&(version & 0xFF)), "version {version:x}");
        assert_eq!(version >> 32, 0, "the upper half of a 32-bit register");
        let (byte, word) = (version & 0xFF, version & 0xFFFF);
        let kept = [u64::MAX << 8 | byte, u64::MAX << 16 | word, byte, word, byte, u64::MAX & !0xFF00 | byte << 8];
        assert_eq!([1, 2, 3, 4, 5, 6].map(read), kept, "round {round}");
    }
    assert_ok!(zone(&g.vm, KVM_UNREGISTER_COALESCED_MMIO, MMIO, 4096, 0));
    for round in 0..3 {
        for (gpa, len, _, low) in wanted {
            let Event::Exit(Exit::Mmio { write: true, gpa: at, len: size, data }) = g.event() else {
                panic!("round {round}: no write to {gpa:x}");
            };
            let whole = match gpa - MMIO {
                0x20 => 0x1122_3344_5566_7788_u64,
                0x38 => -2_i64 as u64,
                _ => low.into(),
            };
            assert_eq!((at, size, &data[..]), (gpa, len, &whole.to_le_bytes()[..len as usize]), "round {round}");
        }
        g.expect_done();
    }
}

fn coalesced_errors() {
    let vm = Vm::new();
    assert_err!(zone(&vm, KVM_REGISTER_COALESCED_MMIO, 0x1000, 4, 2), EINVAL, "neither memory nor port");
    assert_err!(zone(&vm, KVM_UNREGISTER_COALESCED_MMIO, 0x1000, 4, 2), EINVAL, "neither memory nor port");
    assert_ok!(zone(&vm, KVM_UNREGISTER_COALESCED_MMIO, 0x1000, 4, 0));
    assert_err!(vm.ioctl(KVM_REGISTER_COALESCED_MMIO, 8), EFAULT);
    assert_ok!(zone(&vm, KVM_REGISTER_COALESCED_MMIO, u64::MAX, 4, 0));
}

const BASE: u64 = 0x1000_0000;

payload! { client_touch, 64,
    "mov rbx, 0x10000000",
    "2: mov qword ptr [rbx], 1",
    "mov qword ptr [rbx + 0x5000], 1",
    "mov qword ptr [rbx + 0x46000], 1",
    "out 0xed, al",
    "jmp 2b",
}

fn log(vm: &Vm) -> [u64; 2] {
    let mut bitmap = [0u64; 2];
    let d = kvm_dirty_log {
        slot: 1,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
        ..Default::default()
    };
    assert_ok!(vm.set(KVM_GET_DIRTY_LOG, &d));
    bitmap
}

fn clear(vm: &Vm, first_page: u64, num_pages: u32, bits: &mut [u64; 2]) -> Result<i32> {
    let c = kvm_clear_dirty_log {
        slot: 1,
        num_pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
    };
    vm.set(KVM_CLEAR_DIRTY_LOG, &c)
}

fn dirty_log_cleared_by_hand() {
    for initially_set in [false, true] {
        let g = Guest::long(client_touch());
        assert_ok!(enable(&g.vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, if initially_set { 3 } else { 1 }));
        let ram = Ram::new(BASE, 100 * 4096);
        assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
        let all = if initially_set { [u64::MAX, (1 << 36) - 1] } else { [0, 0] };
        assert_eq!(log(&g.vm), all);
        assert_ok!(clear(&g.vm, 0, 100, &mut [u64::MAX; 2]));
        assert_eq!(log(&g.vm), [0, 0]);
        g.expect_done();
        let touched = [1 | 1 << 5, 1 << 6];
        assert_eq!(log(&g.vm), touched);
        assert_eq!(log(&g.vm), touched, "reading does not clear");
        // A part: page 5 stays.
        assert_ok!(clear(&g.vm, 0, 64, &mut [!(1 << 5), 0]));
        assert_eq!(log(&g.vm), [1 << 5, 1 << 6]);
        assert_ok!(clear(&g.vm, 64, 36, &mut [u64::MAX, 0]));
        assert_eq!(log(&g.vm), [1 << 5, 0]);
        g.expect_done();
        assert_eq!(log(&g.vm), touched, "what was cleared is caught again");
    }
}

fn dirty_log_clear_errors() {
    let vm = Vm::new();
    let ram = Ram::new(BASE, 100 * 4096);
    assert_err!(clear(&vm, 0, 64, &mut [0; 2]), ENOENT, "no such slot");
    assert_ok!(vm.map(1, 0, ram));
    assert_err!(clear(&vm, 0, 64, &mut [0; 2]), ENOENT, "a slot without a log");
    assert_ok!(vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    for (first, count) in [(1, 64), (0, 63), (0, 101), (64, 64), (128, 1), (u64::MAX & !63, 64)] {
        assert_err!(clear(&vm, first, count, &mut [0; 2]), EINVAL, "{count} pages from {first}");
    }
    assert_ok!(clear(&vm, 64, 36, &mut [0; 2]));
    assert_ok!(clear(&vm, 0, 100, &mut [0; 2]));
}

fn boot_cpu() {
    let vm = Vm::new();
    assert_ok!(vm.ioctl(KVM_SET_BOOT_CPU_ID, 1));
    vm.create_irqchip();
    let cpus = [vm.create_vcpu(0), vm.create_vcpu(1)];
    assert_err!(vm.ioctl(KVM_SET_BOOT_CPU_ID, 0), EBUSY, "after a vCPU");
    assert_eq!(cpus.each_ref().map(|cpu| cpu.mp_state()), [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_RUNNABLE]);
    assert_eq!(cpus.each_ref().map(|cpu| cpu.sregs().apic_base & 0x100), [0, 0x100]);
    assert_err!(Vm::new().ioctl(KVM_SET_BOOT_CPU_ID, 0x10_0000), EINVAL);
}

payload! { client_priority, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "2: out 0xed, al",
    "mov dword ptr [rbx + 0x80], 0x50",
    "mov eax, [rbx + 0x80]",
    "jmp 2b",
}

payload! { client_page, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "out 0xed, al",
    "mov byte ptr [0x100040], 0x90",
    "out 0xed, al",
    "nop",
    "out 0xed, al",
    "mov byte ptr [0x100040], 0",
    "out 0xed, al",
    "nop",
    "out 0xed, al",
}

/// What the guest writes to the page is its task priority.
fn task_priority_page() {
    const WORD: u64 = DATA + 0x40;
    let g = Guest::long_irqchip(client_page());
    g.set_eoi(Eoi::Xapic);
    let set = |vapic_addr| g.cpu.set(KVM_SET_VAPIC_ADDR, &kvm_vapic_addr { vapic_addr });
    assert_err!(set(0x5000_0000), EINVAL, "an address without memory");
    assert_ok!(set(0));
    g.expect_done();
    assert_ok!(set(WORD));
    g.expect_done();
    assert_eq!(assert_ok!(g.vm.signal_msi(APIC, 0x71)), 1);
    g.expect_done();
    assert_eq!(g.count(0x71), 0, "below the priority");
    g.expect_done();
    g.expect_done();
    assert_eq!(g.count(0x71), 1);
    let without = Guest::long(client_page());
    assert_err!(without.cpu.set(KVM_SET_VAPIC_ADDR, &kvm_vapic_addr { vapic_addr: WORD }), EINVAL, "no local APIC");
}

fn task_priority_reports() {
    if options().bed.contains("intel") && (on_kvm() || options().apicv) {
        skip!("the CPU does these accesses, and nobody sees them");
    }
    let g = Guest::long_irqchip(client_priority());
    let mut control = kvm_tpr_access_ctl { enabled: 1, flags: 1, ..Default::default() };
    assert_err!(g.cpu.set(KVM_TPR_ACCESS_REPORTING, &control), EINVAL, "flags");
    control.flags = 0;
    g.expect_done();
    assert_ok!(g.cpu.set(KVM_TPR_ACCESS_REPORTING, &control));
    for write in [1, 0] {
        g.expect(Event::Exit(Exit::Other(KVM_EXIT_TPR_ACCESS)));
        // SAFETY: the exit is of this kind.
        let access = unsafe { g.cpu.page().__bindgen_anon_1.tpr_access };
        assert_eq!(access.is_write, write);
        assert!((CODE..CODE + 0x100).contains(&access.rip), "{:#x}", access.rip);
    }
    g.expect_done();
    control.enabled = 0;
    assert_ok!(g.cpu.set(KVM_TPR_ACCESS_REPORTING, &control));
    g.expect_done();
    g.expect_done();
}

const PAT: u32 = 0x277;

payload! { cl_read_pat, 64,
    "2: mov ecx, 0x277",
    "rdmsr",
    "out 0xed, al",
    "jmp 2b",
}

/// Sets a filter that denies reading the MSR `PAT`, or one that has nothing to do with it.
fn set_filter(vm: &Vm, deny: bool) {
    let mut bits = 0u64;
    let mut filter = kvm_msr_filter::default();
    filter.ranges[0] = kvm_msr_filter_range {
        flags: KVM_MSR_FILTER_READ,
        nmsrs: 1,
        base: if deny { PAT } else { 0x10 },
        bitmap: (&raw mut bits).cast(),
    };
    assert_ok!(vm.set(KVM_X86_SET_MSR_FILTER, &filter));
}

fn msr_filter() {
    let g = Guest::long(cl_read_pat());
    g.expect_done();
    set_filter(&g.vm, true);
    assert_eq!(g.exception(0), (13, 0));
    set_filter(&g.vm, false);
    g.expect_done();
    let bad = kvm_msr_filter { flags: 2, ..Default::default() };
    assert_err!(g.vm.set(KVM_X86_SET_MSR_FILTER, &bad), EINVAL, "flags");
    let bad = kvm_msr_filter { flags: 1, ..Default::default() };
    assert_err!(g.vm.set(KVM_X86_SET_MSR_FILTER, &bad), EINVAL, "denies everything");
}

/// Whichever comes first, the filter or the vCPU: the vCPU has the filter.
fn msr_filter_while_vcpus_are_made() {
    let g = Guest::long(cl_read_pat());
    let began = now_ns();
    let others: Vec<_> = (100..110).map(|id| g.vm.create_vcpu(id)).collect();
    let creation_ns = (now_ns() - began) / others.len() as u64;
    drop(others);
    for id in 1..60u32 {
        set_filter(&g.vm, false);
        let barrier = std::sync::Barrier::new(2);
        let cpu = std::thread::scope(|s| {
            s.spawn(|| {
                barrier.wait();
                let end = now_ns() + creation_ns * u64::from(id) / 60;
                while now_ns() < end {}
                set_filter(&g.vm, true);
            });
            barrier.wait();
            g.vm.create_vcpu(id)
        });
        assert_ok!(cpu.set_cpuid(&g.cpuid));
        enter_long(&cpu, CODE, STACK - 0x200 * u64::from(id));
        let event = event_of(&cpu, g.ram);
        assert!(matches!(event, Event::Exception { vector: 13, .. }), "vCPU {id} has no filter: {event:x?}");
    }
}

payload! { cl_read, 64,
    "2: mov eax, [rsi]",
    "out 0xef, eax",
    "jmp 2b",
}

/// Slots made and deleted in no particular order, and the last one that there may be. (Each change waits for all readers, so not all of them.)
fn many_scattered_slots() {
    const FIRST: u64 = 0x1000_0000;
    let g = Guest::long(cl_read());
    let limit = g.vm.cap(KVM_CAP_NR_MEMSLOTS) as u32;
    assert!(limit >= 32764, "{limit}");
    let count = 2000;
    let ram = Ram::new(0, 16 * 4096);
    (0..16).for_each(|page| ram.write_u64(page * 4096, 0x600d_0000 + page));
    let gpa = |slot: u32| FIRST + u64::from(slot) * 0x2000;
    let set =
        |slot: u32, len: u64, gpa: u64| g.vm.set_slot(slot, 0, gpa, len, ram.hva as u64 + u64::from(slot % 16) * 4096);
    // The number of slots has no factor of these.
    let scattered = |factor: u64| (1..u64::from(count)).map(move |n| (n * factor % u64::from(count)) as u32);
    let go_to = |at: u64| {
        let mut regs = g.cpu.regs();
        (regs.rip, regs.rsi) = (CODE, at);
        g.cpu.set_regs(&regs);
    };
    let check = |slot: u32, at: u64| {
        go_to(at);
        assert_eq!(g.report(), 0x600d_0000 + slot % 16, "slot {slot}");
    };
    for slot in scattered(4099).filter(|slot| *slot != 0) {
        assert_ok!(set(slot, 4096, gpa(slot)));
    }
    assert_ok!(set(limit - 1, 4096, gpa(limit - 1)));
    check(limit - 1, gpa(limit - 1));
    assert_err!(set(limit, 4096, gpa(limit)), EINVAL, "one too many");
    assert_err!(g.vm.set_slot(0, 0, gpa(77), 4096, ram.hva as u64), EINVAL, "slot 0 is another one");
    assert_err!(set(78, 4096, gpa(77)), EEXIST, "where another slot is");
    (1..count).step_by(101).for_each(|slot| check(slot, gpa(slot)));
    check(count - 1, gpa(count - 1));
    // Some go, some move behind them all, and nobody else notices.
    let goes = |slot: u32| slot % 3 == 1;
    let moves = |slot: u32| slot % 30 == 2;
    for slot in scattered(8209).filter(|slot| *slot != 0) {
        if goes(slot) {
            assert_ok!(set(slot, 0, gpa(slot)));
        } else if moves(slot) {
            assert_ok!(set(slot, 4096, gpa(slot + count)));
        }
    }
    for slot in (1..count).step_by(11) {
        if goes(slot) || moves(slot) {
            go_to(gpa(slot));
            assert!(matches!(assert_ok!(g.cpu.run()), Exit::Mmio { write: false, .. }), "slot {slot} is still there");
            assert_ok!(g.cpu.run());
        }
        if !goes(slot) {
            check(slot, if moves(slot) { gpa(slot + count) } else { gpa(slot) });
        }
    }
    assert_err!(set(1, 0, gpa(1)), EINVAL, "deleted twice");
}
