//! What the process may do, given up for good: its user, its capabilities, and any way to new ones.

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// A privilege could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("privileges: {call}: {error}")]
pub struct PrivilegeError {
    call: &'static str,
    error: Errno,
}

/// Becomes `uid` and `gid`, without groups, without capabilities and without a way to get them back.
///
/// `alone` is whether the caller's supplementary groups can be given up; in a user namespace that somebody
/// without privileges has made they cannot.
pub fn drop_all(uid: Uid, gid: Gid, alone: bool) -> Result<(), PrivilegeError> {
    let at = |call| move |error| PrivilegeError { call, error };
    empty_bounding_set().map_err(at("prctl PR_CAPBSET_DROP"))?;
    if alone {
        set_thread_groups(&[]).map_err(at("setgroups"))?;
    }
    // The jailer has one thread, so these calls are about the whole process.
    set_thread_res_gid(gid, gid, gid).map_err(at("setresgid"))?;
    set_thread_res_uid(uid, uid, uid).map_err(at("setresuid"))?;
    clear_ambient_capability_set().map_err(at("prctl PR_CAP_AMBIENT_CLEAR_ALL"))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(at("capset"))?;
    set_no_new_privs(true).map_err(at("prctl PR_SET_NO_NEW_PRIVS"))?;
    // Until exec; from then on the monitor sees to it itself.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at("prctl PR_SET_DUMPABLE"))
}

/// The kernel tells where its capabilities end by refusing the next one.
fn empty_bounding_set() -> Result<(), Errno> {
    for number in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
