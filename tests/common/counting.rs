//! An allocator that counts the allocations that code under test makes on its thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::link::UNDER_TEST;

thread_local! {
    #[allow(dead_code)]
    pub static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    /// `HELD`: bytes allocated under test minus bytes freed under test. `HELD_MAX`: the highest
    /// value of `HELD`.
    #[allow(dead_code)]
    pub static HELD: Cell<i64> = const { Cell::new(0) };
    #[allow(dead_code)]
    pub static HELD_MAX: Cell<i64> = const { Cell::new(0) };
}

/// The allocator, for `#[global_allocator]`.
pub struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain thread-local
// cells.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if UNDER_TEST.try_with(Cell::get).unwrap_or(false) {
            ALLOCATIONS.with(|count| count.set(count.get() + 1));
            hold(layout.size() as i64);
        }
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if UNDER_TEST.try_with(Cell::get).unwrap_or(false) {
            hold(-(layout.size() as i64));
        }
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn hold(bytes: i64) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    HELD_MAX.set(HELD_MAX.get().max(held));
}
