// SPDX-License-Identifier: GPL-2.0
//! File descriptors with our own `file_operations`, and the misc device node.
//!
//! `owner` is always this module: an open file keeps it loaded, so `rmmod` says busy instead of pulling the code away
//! from under the file. (The kernel crate's `MiscDevice` leaves the owner empty.)
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::{self, NonNull},
};
use kernel::{
    bindings,
    error::from_err_ptr,
    fs::file::{File, FileDescriptorReservation},
    prelude::*,
    sync::{aref::ARef, Arc, ArcBorrow},
    types::Opaque,
};

use super::bindings as own;
use super::{page::UserPage, user};
use crate::arch::Hva;

/// This module, the owner of every file made here.
const OWNER: *mut bindings::module = ptr::addr_of!(bindings::__this_module).cast_mut();

/// What an object behind a file descriptor does when userspace calls.
pub trait FileOperations: Send + Sync + Sized + 'static {
    /// Name of the anonymous inode, as `/proc/PID/fd` shows it.
    const NAME: &'static CStr;
    /// Whether the file can be mapped; if not, `mmap` says ENODEV.
    const MAPPABLE: bool = false;
    /// Whether the file can be read, with [`snapshot`](Self::snapshot); if not, `read` says EINVAL.
    const READABLE: bool = false;

    /// An `ioctl` with its raw command number and argument; 32-bit callers' pointers are converted already.
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize>;

    /// The page behind page `index` of the mapping; `None` gives SIGBUS. Called on first access, may sleep.
    fn page(_this: ArcBorrow<'_, Self>, _index: u64) -> Option<UserPage> {
        None
    }

    /// Whether a mapping may begin at page `first`. `shared`: writes go to the file's pages, and nothing in it is executed.
    fn may_map(_this: ArcBorrow<'_, Self>, _first: u64, _shared: bool) -> bool {
        true
    }

    /// The whole contents of the file at this moment. May sleep.
    fn snapshot(_this: ArcBorrow<'_, Self>) -> Result<KVVec<u8>> {
        Err(EINVAL)
    }

    /// The last descriptor is closed. The file's reference is dropped right after.
    fn release(_this: ArcBorrow<'_, Self>) {}
}

/// The C operation tables of files over `T`.
///
/// # Invariants
///
/// A `struct file` that carries these operations has in `private_data` what [`Arc::into_raw`] gave for an `Arc<T>`; that
/// reference belongs to the file from `anon_inode_getfile` until `release`.
struct FileTable<T>(PhantomData<T>);

impl<T: FileOperations> FileTable<T> {
    const FILE: bindings::file_operations = bindings::file_operations {
        owner: OWNER,
        llseek: Some(bindings::noop_llseek),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: bindings::compat_ptr_ioctl,
        mmap: if T::MAPPABLE { Some(Self::mmap) } else { None },
        read: if T::READABLE { Some(Self::read) } else { None },
        release: Some(Self::release),
        ..pin_init::zeroed()
    };
    const MAPPING: bindings::vm_operations_struct =
        bindings::vm_operations_struct { fault: Some(Self::fault), ..pin_init::zeroed() };

    /// # Safety
    ///
    /// `file` must be an open file with these operations, and stay so for `'a`.
    unsafe fn object<'a>(file: *mut bindings::file) -> ArcBorrow<'a, T> {
        // SAFETY: by the type invariant `private_data` is a live `Arc<T>` as long as the file is open.
        unsafe { ArcBorrow::from_raw((*file).private_data.cast::<T>()) }
    }

    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: the kernel calls this for an open file with these operations and holds it over the call.
        let this = unsafe { Self::object(file) };
        match T::ioctl(this, cmd, arg) {
            Ok(value) => value as c_long,
            Err(error) => error.to_errno() as c_long,
        }
    }

    unsafe extern "C" fn read(
        file: *mut bindings::file,
        to: *mut c_char,
        len: usize,
        at: *mut bindings::loff_t,
    ) -> isize {
        let read = || {
            // SAFETY: the kernel calls this for an open file with these operations and holds it over the call.
            let contents = T::snapshot(unsafe { Self::object(file) })?;
            // SAFETY: the kernel passes a valid pointer to the position, for this call.
            let at = unsafe { &mut *at };
            let rest = usize::try_from(*at).ok().and_then(|start| contents.get(start..)).unwrap_or(&[]);
            let part = rest.get(..rest.len().min(len)).unwrap_or(&[]);
            user::write_bytes(Hva(to as u64), part)?;
            *at = at.wrapping_add(part.len() as bindings::loff_t);
            Ok::<usize, Error>(part.len())
        };
        read().map_or_else(|error| error.to_errno() as isize, |done| done as isize)
    }

    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: the kernel calls this once, at the last close; the file gives its reference back here.
        let this = unsafe { Arc::from_raw((*file).private_data.cast::<T>()) };
        T::release(this.as_arc_borrow());
        0
    }

    unsafe extern "C" fn mmap(file: *mut bindings::file, vma: *mut bindings::vm_area_struct) -> c_int {
        // SAFETY: the kernel passes an open file with these operations, and an area under construction, which only this call may
        // change.
        unsafe {
            let flags = own::krab_vma_flags(vma);
            let shared = flags & (bindings::VM_SHARED | bindings::VM_EXEC) as c_ulong == bindings::VM_SHARED as c_ulong;
            if !T::may_map(Self::object(file), (*vma).vm_pgoff as u64, shared) {
                return EINVAL.to_errno();
            }
            (*vma).vm_ops = &Self::MAPPING;
        }
        0
    }

    unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: the kernel passes a valid fault description; the area holds its file, which has these operations.
        let (this, index) = unsafe {
            let fault = &(*vmf).__bindgen_anon_1;
            (Self::object((*fault.vma).vm_file), fault.pgoff)
        };
        match T::page(this, index as u64) {
            Some(page) => {
                // SAFETY: as above. The reference that `page` owns passes to the fault handler.
                unsafe { (*vmf).page = ManuallyDrop::new(page).as_raw() };
                0
            }
            None => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
}

/// A file and a number for it that userspace cannot use yet.
pub struct NewFile {
    number: FileDescriptorReservation,
    file: ARef<File>,
}

impl NewFile {
    /// The descriptor it will have.
    pub fn number(&self) -> i32 {
        self.number.reserved_fd() as i32
    }

    /// Lets userspace have it. Returns the descriptor, which may be used, and closed, before this returns.
    pub fn install(self) -> i32 {
        let number = self.number.reserved_fd();
        self.number.fd_install(self.file);
        number as i32
    }
}

/// A file (close-on-exec, read-write unless it is only to be read) that owns `this`. EMFILE, ENFILE or ENOMEM without a descriptor or memory for it.
pub fn anon_file<T: FileOperations>(this: Arc<T>) -> Result<NewFile> {
    let number = FileDescriptorReservation::get_unused_fd_flags(bindings::O_CLOEXEC)?;
    let raw = Arc::into_raw(this);
    // SAFETY: the name and the table are static; the table's `private_data` is what its invariant asks for.
    let file = from_err_ptr(unsafe {
        own::anon_inode_getfile_fmode(
            T::NAME.as_char_ptr(),
            &FileTable::<T>::FILE,
            raw.cast_mut().cast(),
            if T::READABLE { bindings::O_RDONLY } else { bindings::O_RDWR } as c_int,
            if T::READABLE { own::krab_fmode_pread } else { 0 },
        )
    });
    match file {
        // SAFETY: the file is new and its reference ours; nobody uses its position.
        Ok(file) => Ok(NewFile { number, file: unsafe { ARef::from_raw(NonNull::new(file.cast()).ok_or(ENOMEM)?) } }),
        Err(error) => {
            // SAFETY: no file was made, so the reference is still ours.
            drop(unsafe { Arc::from_raw(raw) });
            Err(error)
        }
    }
}

/// A new file descriptor (close-on-exec, read-write) whose file owns `this`. Userspace may use it before this returns.
pub fn anon_fd<T: FileOperations>(this: Arc<T>) -> Result<i32> {
    Ok(anon_file(this)?.install())
}

/// The module's device node: opening it creates nothing, only `ioctl` does.
pub trait DeviceOperations: Send + Sync + 'static {
    /// An `ioctl` with its raw command number and argument.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;
}

/// A node under `/dev`.
pub struct Node {
    name: &'static CStr,
    minor: u32,
}

impl Node {
    pub const KRAB: Self = Self { name: c"krab", minor: bindings::MISC_DYNAMIC_MINOR };
    /// KVM's own: same name, same number. Only one module can have it.
    pub const KVM: Self = Self { name: c"kvm", minor: 232 };
}

/// A registered misc device; the node is mode 0600 until udev decides otherwise.
///
/// # Invariants
///
/// `device` is registered from the end of `register` until it is dropped. An open file's `private_data` points at it: that is what
/// the misc driver stores, and this module, the file's owner, cannot go while one is open.
#[pin_data(PinnedDrop)]
pub struct CharDevice<T: DeviceOperations> {
    operations: T,
    #[pin]
    device: Opaque<bindings::miscdevice>,
}

// SAFETY: registration and removal may happen on different threads, and `T: Send`.
unsafe impl<T: DeviceOperations> Send for CharDevice<T> {}
// SAFETY: `&self` gives access to `operations` only, and `T: Sync`.
unsafe impl<T: DeviceOperations> Sync for CharDevice<T> {}

impl<T: DeviceOperations> CharDevice<T> {
    const FILE: bindings::file_operations = bindings::file_operations {
        owner: OWNER,
        llseek: Some(bindings::noop_llseek),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: bindings::compat_ptr_ioctl,
        ..pin_init::zeroed()
    };

    /// Registers the node. It can be opened before this returns. `EBUSY` when another module has its number.
    pub fn register(operations: T, node: Node) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            operations,
            device <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let device = bindings::miscdevice {
                    minor: node.minor as c_int,
                    name: node.name.as_char_ptr(),
                    fops: &Self::FILE,
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for writing, pinned, and unregistered before it goes away.
                kernel::error::to_result(unsafe {
                    slot.write(device);
                    bindings::misc_register(slot)
                })
            }),
        })
    }

    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: by the type's invariant `private_data` points at the `device` of a live `Self`.
        let this = unsafe {
            let device = (*file).private_data.cast::<Opaque<bindings::miscdevice>>();
            &*device.byte_sub(core::mem::offset_of!(Self, device)).cast::<Self>()
        };
        match this.operations.ioctl(cmd, arg) {
            Ok(value) => value as c_long,
            Err(error) => error.to_errno() as c_long,
        }
    }
}

#[pinned_drop]
impl<T: DeviceOperations> PinnedDrop for CharDevice<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: registered, by the type invariant.
        unsafe { bindings::misc_deregister(self.device.get()) };
    }
}
