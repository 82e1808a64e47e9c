// SPDX-License-Identifier: GPL-2.0
//! Who owns the virtualization extension of this host's CPUs.
//!
//! The extension is on while a virtual machine exists and off otherwise, so that another hypervisor may be loaded in between.
//! CPU hotplug and suspend follow, and a reboot turns it off for good. The kernel's own emergency path (panic, kexec after a crash)
//! turns the extension off by looking at the hardware.
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use kernel::{prelude::*, sync::Arc};

use super::{
    bindings,
    cpu::{self, IrqsOff},
    power::{PowerHooks, PowerTarget},
};

/// Switches the extension on the CPU it is called on.
pub(crate) trait Hardware: Send + Sync + 'static {
    /// Turns it on. `EBUSY` when somebody else has it on, which is left alone.
    fn enable(&self, irqs: &IrqsOff) -> Result;
    /// Turns it off if `enable` turned it on here.
    fn disable(&self, irqs: &IrqsOff);
}

/// The callbacks of hotplug get no argument of ours, so they find the hardware here.
static HARDWARE: AtomicPtr<Shared> = AtomicPtr::new(core::ptr::null_mut());

struct Shared {
    enable: fn(*const (), &IrqsOff) -> Result,
    disable: fn(*const (), &IrqsOff),
    hardware: *const (),
    /// Only changed with CPU hotplug locked out.
    active: AtomicBool,
    /// The host goes down: nothing is turned on any more.
    down: AtomicBool,
}

// SAFETY: `hardware` is an `H: Sync`; the rest is immutable or atomic.
unsafe impl Sync for Shared {}

impl Shared {
    fn enable(&self, irqs: &IrqsOff) -> Result {
        if self.down.load(Ordering::Relaxed) {
            return Err(ENODEV);
        }
        (self.enable)(self.hardware, irqs)
    }

    fn disable(&self, irqs: &IrqsOff) {
        (self.disable)(self.hardware, irqs);
    }
}

/// The extension in Krab's hands, counted by the virtual machines that need it.
///
/// # Invariants
///
/// `HARDWARE` points at `shared` from `new` to the drop, and `shared.hardware` at `hardware`.
pub(crate) struct Owner<H: Hardware> {
    /// Dropped first: its callbacks use `shared`.
    _power: Pin<KBox<PowerHooks<Power>>>,
    shared: KBox<Shared>,
    hardware: Arc<H>,
    hotplug_state: i32,
    users: Pin<KBox<kernel::sync::Mutex<usize>>>,
}

// SAFETY: `hardware` is shared by reference only and `H: Sync`; the rest is immutable or locked.
unsafe impl<H: Hardware> Send for Owner<H> {}
// SAFETY: as above.
unsafe impl<H: Hardware> Sync for Owner<H> {}

impl<H: Hardware> Owner<H> {
    /// Follows CPU hotplug and the host's power states from now on. One owner at a time.
    pub(crate) fn new(hardware: Arc<H>) -> Result<Self> {
        let shared = KBox::new(
            Shared {
                enable: |hardware, irqs| {
                    // SAFETY: `hardware` is the `Arc`'s target, which lives longer than `Shared`.
                    unsafe { &*hardware.cast::<H>() }.enable(irqs)
                },
                disable: |hardware, irqs| {
                    // SAFETY: as above.
                    unsafe { &*hardware.cast::<H>() }.disable(irqs)
                },
                hardware: (&raw const *hardware).cast(),
                active: false.into(),
                down: false.into(),
            },
            GFP_KERNEL,
        )?;
        let users = KBox::pin_init(kernel::new_mutex!(0), GFP_KERNEL)?;
        let power = KBox::pin_init(PowerHooks::new(Power), GFP_KERNEL)?;
        HARDWARE.store((&raw const *shared).cast_mut(), Ordering::Release);
        // SAFETY: both callbacks live as long as the module, and `Owner`'s drop removes them.
        let hotplug_state = unsafe { bindings::krab_cpuhp_setup(Some(cpu_up), Some(cpu_down)) };
        if hotplug_state < 0 {
            HARDWARE.store(core::ptr::null_mut(), Ordering::Release);
            return Err(Error::from_errno(hotplug_state));
        }
        Ok(Self { _power: power, shared, hardware, hotplug_state, users })
    }

    /// The hardware.
    pub(crate) fn hardware(&self) -> &Arc<H> {
        &self.hardware
    }

    /// Turns the extension on everywhere for one more user. `EBUSY` when another hypervisor holds it on some CPU: then it is off
    /// again wherever this call turned it on.
    pub(crate) fn acquire(&self) -> Result {
        let mut users = self.users.lock();
        if *users == 0 {
            let _hotplug = HotplugLock::new();
            let failed = core::sync::atomic::AtomicI32::new(0);
            cpu::on_each(|irqs| {
                if let Err(error) = self.shared.enable(irqs) {
                    failed.store(error.to_errno(), Ordering::Relaxed);
                }
            });
            if failed.load(Ordering::Relaxed) != 0 {
                cpu::on_each(|irqs| self.shared.disable(irqs));
                return Err(Error::from_errno(failed.load(Ordering::Relaxed)));
            }
            self.shared.active.store(true, Ordering::Relaxed);
        }
        *users += 1;
        Ok(())
    }

    /// Takes back one [`acquire`](Self::acquire). The last one turns the extension off.
    pub(crate) fn release(&self) {
        let mut users = self.users.lock();
        *users -= 1;
        if *users == 0 {
            let _hotplug = HotplugLock::new();
            self.shared.active.store(false, Ordering::Relaxed);
            cpu::on_each(|irqs| self.shared.disable(irqs));
        }
    }
}

impl<H: Hardware> Drop for Owner<H> {
    fn drop(&mut self) {
        // SAFETY: the state was made by `new` and is removed once. No callback runs after this.
        unsafe { bindings::krab_cpuhp_remove(self.hotplug_state) };
        HARDWARE.store(core::ptr::null_mut(), Ordering::Release);
    }
}

/// No CPU comes or goes while this lives.
struct HotplugLock(());

impl HotplugLock {
    fn new() -> Self {
        // SAFETY: taken in a sleepable context; the drop unlocks.
        unsafe { bindings::krab_cpus_read_lock() };
        Self(())
    }
}

impl Drop for HotplugLock {
    fn drop(&mut self) {
        // SAFETY: locked by `new`.
        unsafe { bindings::krab_cpus_read_unlock() };
    }
}

fn with_active(call: impl FnOnce(&Shared) -> Result) -> i32 {
    // SAFETY: the callbacks run between `Owner::new` and the end of its drop only, while the pointer is valid or null.
    match unsafe { HARDWARE.load(Ordering::Acquire).as_ref() } {
        Some(shared) if shared.active.load(Ordering::Relaxed) => match call(shared) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        },
        _ => 0,
    }
}

unsafe extern "C" fn cpu_up(_cpu: u32) -> i32 {
    with_active(|shared| shared.enable(&IrqsOff::new()))
}

unsafe extern "C" fn cpu_down(_cpu: u32) -> i32 {
    with_active(|shared| {
        shared.disable(&IrqsOff::new());
        Ok(())
    })
}

/// What the owner does when the host goes to sleep or down.
struct Power;

impl PowerTarget for Power {
    fn reboot(&self) {
        let _hotplug = HotplugLock::new();
        // SAFETY: the hook is unregistered before `Owner` drops what the pointer names.
        if let Some(shared) = unsafe { HARDWARE.load(Ordering::Acquire).as_ref() } {
            // An `acquire` on its way on some CPU has turned the extension on before this call comes by, or sees the flag.
            shared.down.store(true, Ordering::SeqCst);
            cpu::on_each(|irqs| shared.disable(irqs));
        }
    }

    fn suspend(&self) {
        with_active(|shared| {
            // SAFETY: interrupts are off in this callback.
            shared.disable(&unsafe { IrqsOff::assume() });
            Ok(())
        });
    }

    fn resume(&self) {
        // SAFETY: as above.
        let error = with_active(|shared| shared.enable(&unsafe { IrqsOff::assume() }));
        if error != 0 {
            pr_err!("the virtualization extension did not come back after suspend: error {error}\n");
        }
    }
}
