/* SPDX-License-Identifier: GPL-2.0 */
/* Tracepoints, like those of KVM: events/krab/ in tracefs. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM krab

#if !defined(KRAB_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define KRAB_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(krab_entry,
	TP_PROTO(unsigned int vcpu, u64 rip),
	TP_ARGS(vcpu, rip),
	TP_STRUCT__entry(
		__field(u64, rip)
		__field(unsigned int, vcpu)
	),
	TP_fast_assign(
		__entry->rip = rip;
		__entry->vcpu = vcpu;
	),
	TP_printk("vcpu %u rip 0x%llx", __entry->vcpu, __entry->rip)
);

TRACE_EVENT(krab_exit,
	TP_PROTO(unsigned int vcpu, u64 rip, unsigned int reason),
	TP_ARGS(vcpu, rip, reason),
	TP_STRUCT__entry(
		__field(u64, rip)
		__field(unsigned int, vcpu)
		__field(unsigned int, reason)
	),
	TP_fast_assign(
		__entry->rip = rip;
		__entry->vcpu = vcpu;
		__entry->reason = reason;
	),
	/* `Exit::number` in src/guest/exit.rs. */
	TP_printk("vcpu %u reason %s rip 0x%llx", __entry->vcpu,
		  __print_symbolic(__entry->reason,
				   { 0, "interrupt" }, { 1, "nmi" }, { 2, "interrupt_window" }, { 3, "nmi_window" },
				   { 4, "exception" }, { 5, "cpuid" }, { 6, "hlt" }, { 7, "pause" }, { 8, "hypercall" },
				   { 9, "msr" }, { 10, "io" }, { 11, "cr" }, { 12, "dr" }, { 13, "nested_fault" },
				   { 14, "shutdown" }, { 15, "other" }),
		  __entry->rip)
);

TRACE_EVENT(krab_page_fault,
	TP_PROTO(unsigned int vcpu, u64 gpa, bool write, bool execute, bool present),
	TP_ARGS(vcpu, gpa, write, execute, present),
	TP_STRUCT__entry(
		__field(u64, gpa)
		__field(unsigned int, vcpu)
		__field(bool, write)
		__field(bool, execute)
		__field(bool, present)
	),
	TP_fast_assign(
		__entry->gpa = gpa;
		__entry->vcpu = vcpu;
		__entry->write = write;
		__entry->execute = execute;
		__entry->present = present;
	),
	TP_printk("vcpu %u gpa 0x%llx %s%s%s", __entry->vcpu, __entry->gpa,
		  __entry->write ? "write" : "read", __entry->execute ? " execute" : "", __entry->present ? " present" : "")
);

TRACE_EVENT(krab_mmio,
	TP_PROTO(bool write, u64 gpa, unsigned int len, u64 value),
	TP_ARGS(write, gpa, len, value),
	TP_STRUCT__entry(
		__field(u64, gpa)
		__field(u64, value)
		__field(unsigned int, len)
		__field(bool, write)
	),
	TP_fast_assign(
		__entry->gpa = gpa;
		__entry->value = value;
		__entry->len = len;
		__entry->write = write;
	),
	TP_printk("mmio %s len %u gpa 0x%llx val 0x%llx", __entry->write ? "write" : "read", __entry->len,
		  __entry->gpa, __entry->value)
);

TRACE_EVENT(krab_pio,
	TP_PROTO(bool write, u16 port, unsigned int size, unsigned int count),
	TP_ARGS(write, port, size, count),
	TP_STRUCT__entry(
		__field(unsigned int, size)
		__field(unsigned int, count)
		__field(u16, port)
		__field(bool, write)
	),
	TP_fast_assign(
		__entry->size = size;
		__entry->count = count;
		__entry->port = port;
		__entry->write = write;
	),
	TP_printk("pio_%s at 0x%x size %u count %u", __entry->write ? "write" : "read", __entry->port,
		  __entry->size, __entry->count)
);

TRACE_EVENT(krab_msr,
	TP_PROTO(bool write, u32 index, u64 value, bool refused),
	TP_ARGS(write, index, value, refused),
	TP_STRUCT__entry(
		__field(u64, value)
		__field(u32, index)
		__field(bool, write)
		__field(bool, refused)
	),
	TP_fast_assign(
		__entry->value = value;
		__entry->index = index;
		__entry->write = write;
		__entry->refused = refused;
	),
	TP_printk("msr_%s %x = 0x%llx%s", __entry->write ? "write" : "read", __entry->index, __entry->value,
		  __entry->refused ? " (#GP)" : "")
);

TRACE_EVENT(krab_inject,
	TP_PROTO(unsigned int vcpu, unsigned int kind, u8 vector),
	TP_ARGS(vcpu, kind, vector),
	TP_STRUCT__entry(
		__field(unsigned int, vcpu)
		__field(unsigned int, kind)
		__field(u8, vector)
	),
	TP_fast_assign(
		__entry->vcpu = vcpu;
		__entry->kind = kind;
		__entry->vector = vector;
	),
	TP_printk("vcpu %u %s 0x%x", __entry->vcpu,
		  __print_symbolic(__entry->kind, { 0, "interrupt" }, { 1, "nmi" }, { 2, "exception" }), __entry->vector)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
