// SPDX-License-Identifier: Apache-2.0 OR MIT
//! COM1, a 16550A, between the guest and this process's standard input and output.
//!
//! The device model is vm-superio's. Output goes through two locks: the model collects bytes while the device is
//! locked, and they are written while only the output is locked. So a terminal that does not take output holds up the
//! vCPU that wrote, but never the main loop, which feeds input and handles signals.
//! Lock order: output, then device.

use std::io::{self, Write};
use std::sync::Mutex;

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::lock;

/// COM1's interrupt line: edges go to the in-kernel irqchip through this irqfd.
struct IrqLine(EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the main loop that the guest has read all input, so more can follow.
struct InputDrained(EventFd);

impl SerialEvents for InputDrained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter means that the main loop has been told.
        let _ = self.0.write(1);
    }
}

/// COM1 with its output.
pub struct Console {
    device: Mutex<Serial<IrqLine, InputDrained, Vec<u8>>>,
    output: Mutex<Box<dyn Write + Send>>,
}

impl Console {
    /// `irq` is an irqfd of [`COM1_IRQ`](super::COM1_IRQ); `drained` is signalled when the guest has read all input.
    pub fn new(irq: EventFd, drained: EventFd, output: Box<dyn Write + Send>) -> Self {
        let device = Serial::with_events(IrqLine(irq), InputDrained(drained), Vec::new());
        Console { device: Mutex::new(device), output: Mutex::new(output) }
    }

    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.device).read(offset)
    }

    pub fn write(&self, offset: u8, value: u8) {
        // Writing to memory cannot fail, and an irqfd only refuses when an interrupt is pending already.
        let _ = lock(&self.device).write(offset, value);
    }

    /// Bytes of input that fit now.
    pub fn input_room(&self) -> usize {
        lock(&self.device).fifo_capacity()
    }

    /// Offers `input` to the guest and returns how many bytes it took.
    pub fn input(&self, input: &[u8]) -> usize {
        lock(&self.device).enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// Writes out what the guest has sent, in the order in which it was sent.
    pub fn flush(&self) -> io::Result<()> {
        if lock(&self.device).writer().is_empty() {
            return Ok(());
        }
        let mut output = lock(&self.output);
        let bytes = std::mem::take(lock(&self.device).writer_mut());
        output.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn output_arrives_in_order_and_once() {
        let sink = Sink::default();
        let console = Console::new(event(), event(), Box::new(sink.clone()));
        for byte in *b"hello" {
            console.write(0, byte);
        }
        assert!(sink.0.lock().unwrap().is_empty());
        console.flush().unwrap();
        console.flush().unwrap();
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_interrupts_and_drains() {
        let (irq, drained) = (event(), event());
        let console = Console::new(irq.try_clone().unwrap(), drained.try_clone().unwrap(), Box::new(io::sink()));
        console.write(1, 1); // interrupt when data is there
        assert_eq!(console.input(b"ab"), 2);
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!((console.read(0), console.read(0)), (b'a', b'b'));
        assert_eq!(drained.read().unwrap(), 1);
    }

    #[test]
    fn a_full_fifo_takes_nothing() {
        let console = Console::new(event(), event(), Box::new(io::sink()));
        let room = console.input_room();
        assert_eq!(console.input(&vec![0; room + 5]), room);
        assert_eq!(console.input_room(), 0);
        assert_eq!(console.input(b"x"), 0);
    }
}
