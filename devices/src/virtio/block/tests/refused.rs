//! Hosts that refuse io_uring, at once or later: each test runs in a thread with a system call filter.
#![allow(unsafe_code)] // there is no other way to install a filter

use rustix::io::Errno;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::super::*;
use super::guest::{DATA, Guest, HEADERS, image, options, pattern};

/// Makes the system call `number` fail with `error` in this thread and in those that it starts.
fn refuse(number: i64, error: Errno) {
    let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let compare = libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: number as u32 };
    let give = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let fail = give(libc::SECCOMP_RET_ERRNO | error.raw_os_error() as u32);
    let mut filter = [load_number, compare, fail, give(libc::SECCOMP_RET_ALLOW)];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: these calls only read `program`, which outlives them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

/// Runs `test` in a thread, whose filter ends with it.
fn apart(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(test).join().unwrap());
}

fn reads(guest: &mut Guest) {
    let answer = guest.request(VIRTIO_BLK_T_IN, 1, &[], 512);
    assert_eq!((answer.status, answer.data), (0, (512..1024).map(pattern).collect()));
}

#[test]
fn without_rings_auto_goes_on_and_async_is_refused() {
    for number in [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register] {
        for error in [Errno::PERM, Errno::NOSYS, Errno::NOMEM] {
            apart(|| {
                refuse(number, error);
                let file = image(8192);
                let mut guest = Guest::new(options(&file, Engine::Auto));
                assert!(!guest.device.uses_uring());
                reads(&mut guest);
                assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).status, 0);
                drop(guest);
                let file = BlockFile::open(options(&file, Engine::Async)).unwrap();
                let refused = Block::new(file).err();
                assert!(matches!(refused, Some(BlockError::Uring { error: e, .. })
                    if e.raw_os_error() == Some(error.raw_os_error())));
            });
        }
    }
}

#[test]
fn a_ring_that_stops_working_needs_reset_and_then_goes_on_without() {
    apart(|| {
        let mut guest = Guest::new(options(&image(8192), Engine::Async));
        reads(&mut guest);
        refuse(libc::SYS_io_uring_enter, Errno::PERM);
        guest.header(HEADERS, VIRTIO_BLK_T_IN, 1);
        guest.offer(&[(HEADERS, 16, false), (DATA, 513, true)]);
        guest.device.notify(0);
        assert!(guest.interrupt.is_broken());
        guest.device.reset();
        assert_eq!(Arc::strong_count(&guest.memory), 1);
        guest.activate(0);
        for _ in 0..2 * QUEUE_SIZE {
            reads(&mut guest);
        }
    });
}

#[test]
fn a_kernel_without_memory_is_asked_again() {
    for error in [Errno::AGAIN, Errno::BUSY] {
        let mut guest = Guest::new(options(&image(8192), Engine::Async));
        guest.header(HEADERS, VIRTIO_BLK_T_IN, 1);
        guest.offer(&[(HEADERS, 16, false), (DATA, 513, true)]);
        apart(|| {
            refuse(libc::SYS_io_uring_enter, error);
            guest.device.notify(0);
            for _ in 0..3 {
                assert!(guest.step(30), "nobody asks again");
            }
            assert!(guest.used_index() == 0 && !guest.interrupt.is_broken());
        });
        // In this thread there is memory again.
        guest.run_until(1);
        assert_eq!(guest.get(DATA, 512), (512..1024).map(pattern).collect::<Vec<_>>());
    }
}
