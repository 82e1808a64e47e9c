// SPDX-License-Identifier: GPL-2.0
//! Event descriptors: signalling one (ioeventfd, resampling), and being told when one is signalled (irqfd).
use core::{
    ptr::NonNull,
    sync::atomic::{AtomicBool, Ordering},
};
use kernel::{
    bindings,
    error::{from_err_ptr, to_result},
    prelude::*,
    types::Opaque,
};

use super::bindings as own;

/// `EPOLLIN` and `EPOLLHUP`, which C casts to a type of their own.
const EPOLL_IN: usize = bindings::POLLIN as usize;
const EPOLL_HUP: usize = bindings::POLLHUP as usize;

/// A reference to an eventfd.
///
/// # Invariants
///
/// Owns one reference of `context`.
pub struct EventFd {
    context: NonNull<bindings::eventfd_ctx>,
}

// SAFETY: the context is reference-counted and does its own locking.
unsafe impl Send for EventFd {}
// SAFETY: as above.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// The eventfd behind a file descriptor of the current process; EBADF or EINVAL if there is none.
    pub fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: any number may be asked for.
        let context = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(fd) })?;
        // INVARIANT: the call gave us a reference.
        Ok(Self { context: NonNull::new(context).ok_or(EINVAL)? })
    }

    /// Adds one to its counter. For any context but NMI.
    #[inline]
    pub fn signal(&self) {
        // SAFETY: the context is alive.
        unsafe { bindings::eventfd_signal_mask(self.context.as_ptr(), 0) };
    }

    /// Whether both are the same eventfd, as deassigning asks.
    pub fn is_same(&self, other: &Self) -> bool {
        self.context == other.context
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: the reference is ours.
        unsafe { bindings::eventfd_ctx_put(self.context.as_ptr()) };
    }
}

/// What an [`Irqfd`] tells.
pub trait IrqfdTarget: Send + Sync + 'static {
    /// The eventfd was signalled. Atomic context with interrupts off, unless it was signalled before the irqfd was made.
    fn signaled(&self);
}

/// Calls its `T` whenever an eventfd is signalled, and eats the signal. The eventfd may be closed at any time:
/// then the irqfd is [dead](Self::is_dead), and its owner drops it when it next comes across it.
///
/// # Invariants
///
/// - `wait` is in the wait queue of `eventfd` exactly while `attached` is set, that is from inside [`new`](Self::new) until
///   the drop. The callback runs under the queue's lock, so not after it was taken out.
/// - All other fields are initialised before that.
#[pin_data(PinnedDrop)]
pub struct Irqfd<T: IrqfdTarget> {
    eventfd: EventFd,
    attached: AtomicBool,
    dead: AtomicBool,
    target: T,
    #[pin]
    wait: Opaque<bindings::wait_queue_entry>,
}

// SAFETY: the wait queue does its own locking; the rest is `Send` by itself.
unsafe impl<T: IrqfdTarget> Send for Irqfd<T> {}
// SAFETY: shared access is to atomics and `T: Sync`.
unsafe impl<T: IrqfdTarget> Sync for Irqfd<T> {}

/// A poll table on the stack that says what asks.
///
/// # Invariants
///
/// `wait` is the entry of a live irqfd while the table is in use.
#[repr(C)]
struct Registration {
    table: bindings::poll_table_struct,
    wait: *mut bindings::wait_queue_entry,
    result: c_int,
}

impl<T: IrqfdTarget> Irqfd<T> {
    /// Listens to the eventfd `fd` of the current process. If it is signalled already, `target` is told at once. EBUSY when an irqfd
    /// listens to it already.
    pub fn new(fd: i32, target: T) -> Result<Pin<KBox<Self>>> {
        let eventfd = EventFd::from_fd(fd)?;
        // SAFETY: any number may be asked for.
        let file = from_err_ptr(unsafe { bindings::eventfd_fget(fd) })?;
        let irqfd = KBox::pin_init(
            pin_init!(Self {
                eventfd,
                attached: AtomicBool::new(false),
                dead: AtomicBool::new(false),
                target,
                wait <- Opaque::ffi_init(|slot: *mut bindings::wait_queue_entry| {
                    let entry = bindings::wait_queue_entry { func: Some(Self::wake), ..pin_init::zeroed() };
                    // SAFETY: `slot` is valid for writing.
                    unsafe { slot.write(entry) }
                }),
            }),
            GFP_KERNEL_ACCOUNT,
        );
        let polled = irqfd.map_err(Error::from).and_then(|irqfd| {
            // The descriptor may have been replaced between the two look-ups.
            // SAFETY: the file is an eventfd, by its look-up.
            let context = from_err_ptr(unsafe { bindings::eventfd_ctx_fileget(file) })?;
            let same = irqfd.eventfd.is_same(&EventFd { context: NonNull::new(context).ok_or(EINVAL)? });
            if !same {
                return Err(EBADF);
            }
            let mut registration = Registration {
                table: bindings::poll_table_struct { _qproc: Some(Self::register), _key: !0 },
                wait: irqfd.wait.get(),
                result: EINVAL.to_errno(),
            };
            // SAFETY: the file is open. INVARIANT: the irqfd outlives the call.
            let events = unsafe { own::krab_poll(file, &mut registration.table) };
            to_result(registration.result)?;
            // INVARIANT: `register` has put the entry into the queue.
            irqfd.attached.store(true, Ordering::Relaxed);
            if events as usize & EPOLL_IN != 0 {
                irqfd.target.signaled();
            }
            Ok(irqfd)
        });
        // SAFETY: the reference that the look-up gave us.
        unsafe { bindings::fput(file) };
        polled
    }

    /// Whether the eventfd was closed, so nothing will ever come.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// The eventfd.
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// What the irqfd calls.
    pub fn target(&self) -> &T {
        &self.target
    }

    unsafe extern "C" fn register(
        _file: *mut bindings::file,
        queue: *mut bindings::wait_queue_head_t,
        table: *mut bindings::poll_table_struct,
    ) {
        // SAFETY: the table is the first field of a live `Registration`; the queue is the eventfd's.
        unsafe {
            let registration = &mut *table.cast::<Registration>();
            registration.result = own::krab_add_wait_queue_priority_exclusive(queue, registration.wait);
        }
    }

    unsafe extern "C" fn wake(
        entry: *mut bindings::wait_queue_entry,
        _mode: c_uint,
        _flags: c_int,
        key: *mut c_void,
    ) -> c_int {
        let field = Opaque::cast_from(entry);
        // SAFETY: by the type invariant, called only while the entry is queued, so with a live `Self`.
        let this = unsafe { &*kernel::container_of!(field, Self, wait) };
        let events = key as usize;
        if events & EPOLL_HUP != 0 {
            this.dead.store(true, Ordering::Relaxed);
        }
        if events & EPOLL_IN == 0 {
            return 0;
        }
        let mut count = 0;
        // SAFETY: the context is alive, and its queue's lock is held by whoever calls this.
        unsafe { bindings::eventfd_ctx_do_read(this.eventfd.context.as_ptr(), &mut count) };
        this.target.signaled();
        1
    }
}

#[pinned_drop]
impl<T: IrqfdTarget> PinnedDrop for Irqfd<T> {
    fn drop(self: Pin<&mut Self>) {
        if self.attached.load(Ordering::Relaxed) {
            let mut count = 0;
            // SAFETY: queued there, by the type invariant. After this no callback runs.
            unsafe {
                bindings::eventfd_ctx_remove_wait_queue(self.eventfd.context.as_ptr(), self.wait.get(), &mut count)
            };
        }
    }
}

const _: () = assert!(core::mem::offset_of!(Registration, table) == 0);
