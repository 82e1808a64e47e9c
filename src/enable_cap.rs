// SPDX-License-Identifier: GPL-2.0
//! KVM_ENABLE_CAP on a VM: what userspace turns on, one capability a time. KVM API "Capabilities that can be enabled on VMs".
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    abi::{
        cap::*,
        vm::{
            KvmEnableCap, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_VALID_FLAGS,
        },
    },
    irqchip::routing::MAX_ROUTES,
    vendor::Vendor,
    vm::Vm,
};

impl<V: Vendor> Vm<V> {
    /// KVM_ENABLE_CAP. `EINVAL` for a capability that cannot be enabled here, or an argument that it does not know.
    pub(crate) fn enable_cap(&self, request: &KvmEnableCap) -> Result {
        let argument = request.args[0];
        if request.flags != 0 {
            return Err(EINVAL);
        }
        match request.cap {
            KVM_CAP_SPLIT_IRQCHIP => {
                let pins =
                    u16::try_from(argument).ok().filter(|&pins| usize::from(pins) <= MAX_ROUTES).ok_or(EINVAL)?;
                let _setup = self.setup.lock();
                if self.peers.len() > 0 {
                    return Err(EEXIST);
                }
                self.irq.split(pins)
            }
            KVM_CAP_X2APIC_API => {
                if argument & !u64::from(KVM_X2APIC_API_VALID_FLAGS) != 0 {
                    return Err(EINVAL);
                }
                let has = |flag: u32| argument & u64::from(flag) != 0;
                let wide_ids = has(KVM_X2APIC_API_USE_32BIT_IDS);
                self.irq.set_x2apic_api(wide_ids, has(KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK));
                Ok(())
            }
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
                let enable = argument & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
                let known = if enable { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET } else { 0 };
                if argument & !known != 0 {
                    return Err(EINVAL);
                }
                self.memory.set_manual_protect(enable, argument & KVM_DIRTY_LOG_INITIALLY_SET != 0);
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }
}
