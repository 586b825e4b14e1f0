//! Pages that KVM hands over to the secure processor (`KVM_SEV_SNP_LAUNCH_UPDATE`, Linux
//! `Documentation/virt/kvm/x86/amd-memory-encryption.rst`): it may do a part of what it is asked and tell what is left, or want to be
//! asked again. What it tells is checked, and it is not asked for ever.

use cofferdam_firmware::layout::PAGE_SIZE;
use kvm_bindings::kvm_sev_snp_launch_update;

use crate::platform::LaunchError;

/// How often KVM may want to be asked again in a row, and do nothing.
const MOST_TRIES: u32 = 1000;

/// Has `command` hand over all pages of `update`. It is given what is left, and leaves there what is left then.
pub(super) fn hand_over(
    update: &mut kvm_sev_snp_launch_update,
    mut command: impl FnMut(&mut kvm_sev_snp_launch_update) -> Result<(), LaunchError>,
) -> Result<(), LaunchError> {
    let mut tries: u32 = 0;
    while update.len != 0 {
        let before = *update;
        let refused = match command(update) {
            Ok(()) => None,
            Err(error) if is_temporary(&error) => Some(error),
            Err(error) => return Err(error),
        };
        if is_further(update, &before) {
            tries = 0;
            continue;
        }
        tries = tries.saturating_add(1);
        match refused {
            Some(_) if place(update) == place(&before) && tries < MOST_TRIES => {}
            Some(error) if place(update) == place(&before) => return Err(error),
            _ => {
                let gpa = |update: &kvm_sev_snp_launch_update| update.gfn_start.saturating_mul(PAGE_SIZE);
                return Err(LaunchError::Progress {
                    gpa: gpa(&before),
                    length: before.len,
                    now: gpa(update),
                    left: update.len,
                });
            }
        }
    }
    Ok(())
}

fn place(update: &kvm_sev_snp_launch_update) -> (u64, u64, u64) {
    (update.gfn_start, update.uaddr, update.len)
}

/// Whether some of the pages of `before` are done, and `update` is about the others.
fn is_further(update: &kvm_sev_snp_launch_update, before: &kvm_sev_snp_launch_update) -> bool {
    let Some(done) = before.len.checked_sub(update.len).filter(|done| *done != 0) else { return false };
    let next = (before.gfn_start.wrapping_add(done / PAGE_SIZE), before.uaddr.wrapping_add(done), update.len);
    done.is_multiple_of(PAGE_SIZE) && place(update) == next
}

fn is_temporary(error: &LaunchError) -> bool {
    let errno = match error {
        LaunchError::Command { source, .. } => source.error.errno(),
        _ => 0,
    };
    matches!(errno, libc::EAGAIN | libc::EINTR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snp::command::{CommandError, FirmwareStatus};

    const ADDRESS: u64 = 0x7000_0000;

    fn pages(first: u64, count: u64) -> kvm_sev_snp_launch_update {
        let (uaddr, len) = (ADDRESS + first * PAGE_SIZE, count * PAGE_SIZE);
        kvm_sev_snp_launch_update { gfn_start: 0x10 + first, uaddr, len, ..Default::default() }
    }

    fn refusal(errno: i32) -> LaunchError {
        let source = CommandError { error: kvm_ioctls::Error::new(errno), firmware: FirmwareStatus(0) };
        LaunchError::Command { command: "UPDATE", at: String::new(), source }
    }

    /// Hands over four pages to a KVM whose answers are `answers`: what is left, and an errno or 0. It is asked for what is left.
    fn handed_over(answers: &[(kvm_sev_snp_launch_update, i32)]) -> (Result<(), LaunchError>, usize) {
        let (mut update, mut asked) = (pages(0, 4), 0);
        let mut expected = update;
        let done = hand_over(&mut update, |update| {
            assert_eq!(place(update), place(&expected));
            let (left, errno) = answers[asked.min(answers.len() - 1)];
            (*update, expected) = (left, left);
            asked += 1;
            if errno == 0 { Ok(()) } else { Err(refusal(errno)) }
        });
        (done, asked)
    }

    #[test]
    fn it_goes_on_where_kvm_has_stopped() {
        for answers in [
            &[(pages(4, 0), 0)][..],
            &[(pages(1, 3), 0), (pages(3, 1), 0), (pages(4, 0), 0)],
            &[(pages(0, 4), libc::EAGAIN), (pages(2, 2), libc::EINTR), (pages(4, 0), 0)],
        ] {
            let (done, asked) = handed_over(answers);
            done.unwrap();
            assert_eq!(asked, answers.len());
        }
    }

    #[test]
    fn kvm_is_not_asked_for_ever() {
        for errno in [libc::EAGAIN, libc::EINTR] {
            let (done, asked) = handed_over(&[(pages(0, 4), errno)]);
            assert_eq!(done.unwrap_err().to_string(), refusal(errno).to_string());
            assert_eq!(asked, MOST_TRIES as usize);
        }
        // Something is done in between.
        let mut answers = vec![(pages(0, 4), libc::EAGAIN); MOST_TRIES as usize - 1];
        answers.push((pages(1, 3), 0));
        answers.extend(vec![(pages(1, 3), libc::EAGAIN); MOST_TRIES as usize - 1]);
        answers.push((pages(4, 0), 0));
        handed_over(&answers).0.unwrap();
    }

    #[test]
    fn other_refusals_are_final() {
        let (done, asked) = handed_over(&[(pages(0, 4), libc::EIO)]);
        assert!(matches!(done, Err(LaunchError::Command { .. })) && asked == 1);
    }

    #[test]
    fn progress_that_cannot_be_is_refused() {
        let rest = 3 * PAGE_SIZE + 1;
        let half = kvm_sev_snp_launch_update { len: rest, uaddr: ADDRESS + PAGE_SIZE - 1, ..pages(0, 4) };
        let bad = [
            pages(0, 4),                                                  // none
            pages(1, 4),                                                  // a window that moves
            pages(0, 5),                                                  // more to do than before
            pages(5, u64::MAX >> 12),                                     // beyond the end
            pages(0, 3),                                                  // the last one instead of the first
            half,                                                         // a part of a page
            kvm_sev_snp_launch_update { uaddr: ADDRESS, ..pages(1, 3) },  // another page's content
            kvm_sev_snp_launch_update { gfn_start: 0x10, ..pages(1, 3) }, // another page
        ];
        for left in bad {
            for errno in [0, libc::EAGAIN] {
                if errno != 0 && place(&left) == place(&pages(0, 4)) {
                    continue;
                }
                let (done, asked) = handed_over(&[(left, errno)]);
                assert!(matches!(done, Err(LaunchError::Progress { .. })), "{left:x?}: {done:?}");
                assert_eq!(asked, 1);
            }
        }
        let words = "KVM_SEV_SNP_LAUNCH_UPDATE of 0x4000 bytes at 0x10000: KVM says that 0x5000 bytes at 0x10000 are left";
        assert_eq!(handed_over(&[(pages(0, 5), 0)]).0.unwrap_err().to_string(), words);
    }
}
