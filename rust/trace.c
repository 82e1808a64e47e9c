// SPDX-License-Identifier: GPL-2.0
/* The tracepoints, and a plain function for each: rust/trace.rs calls it when the tracepoint is on. */
#define CREATE_TRACE_POINTS
#include "trace.h"

void krab_do_trace_entry(unsigned int vcpu, u64 rip);
void krab_do_trace_exit(unsigned int vcpu, u64 rip, unsigned int reason);
void krab_do_trace_page_fault(unsigned int vcpu, u64 gpa, bool write, bool execute, bool present);
void krab_do_trace_mmio(bool write, u64 gpa, unsigned int len, u64 value);
void krab_do_trace_pio(bool write, u16 port, unsigned int size, unsigned int count);
void krab_do_trace_msr(bool write, u32 index, u64 value, bool refused);
void krab_do_trace_inject(unsigned int vcpu, unsigned int kind, u8 vector);

void krab_do_trace_entry(unsigned int vcpu, u64 rip)
{
	trace_krab_entry(vcpu, rip);
}

void krab_do_trace_exit(unsigned int vcpu, u64 rip, unsigned int reason)
{
	trace_krab_exit(vcpu, rip, reason);
}

void krab_do_trace_page_fault(unsigned int vcpu, u64 gpa, bool write, bool execute, bool present)
{
	trace_krab_page_fault(vcpu, gpa, write, execute, present);
}

void krab_do_trace_mmio(bool write, u64 gpa, unsigned int len, u64 value)
{
	trace_krab_mmio(write, gpa, len, value);
}

void krab_do_trace_pio(bool write, u16 port, unsigned int size, unsigned int count)
{
	trace_krab_pio(write, port, size, count);
}

void krab_do_trace_msr(bool write, u32 index, u64 value, bool refused)
{
	trace_krab_msr(write, index, value, refused);
}

void krab_do_trace_inject(unsigned int vcpu, unsigned int kind, u8 vector)
{
	trace_krab_inject(vcpu, kind, vector);
}
