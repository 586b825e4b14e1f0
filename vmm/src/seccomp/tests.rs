use super::*;
use std::collections::BTreeSet;
use std::env;
use std::path::PathBuf;
use std::process::Command;

use syscalls::Sysno;

#[path = "../../build/search.rs"]
mod search;

/// A policy that allows reading.
const READ: &str = r#"{"mismatch_action": "trap", "match_action": "allow", "filter": [{"syscall": "read"}]}"#;

fn compile(text: &str) -> Result<Policies, SeccompError> {
    Policies::from_json(text.as_bytes(), "F".to_owned())
}

fn refusal(text: &str) -> String {
    compile(text).err().unwrap().to_string()
}

#[test]
fn a_file_has_a_policy_for_each_kind_of_thread_and_no_other() {
    let policies = compile(&format!(r#"{{"vmm": {READ}, "vcpu": {READ}, "api": {READ}}}"#)).unwrap();
    assert!(!policies.vmm.is_empty() && policies.vmm == policies.vcpu && policies.vmm == policies.api);
    for (missing, others) in [("vmm", ["vcpu", "api"]), ("vcpu", ["vmm", "api"]), ("api", ["vmm", "vcpu"])] {
        let [a, b] = others;
        let text = format!(r#"{{"{a}": {READ}, "{b}": {READ}}}"#);
        let message =
            format!("--seccomp-filter F: has no policy \"{missing}\"; there have to be vmm, vcpu and api");
        assert_eq!(refusal(&text), message);
    }
    let text = format!(r#"{{"vmm": {READ}, "vcpu": {READ}, "api": {READ}, "cpu": {READ}}}"#);
    assert_eq!(
        refusal(&text),
        "--seccomp-filter F: has a policy \"cpu\"; there have to be vmm, vcpu and api"
    );
}

#[test]
fn what_is_no_policy_is_refused_in_words() {
    for (text, words) in [
        ("", "EOF while parsing"),
        ("[]", "invalid type"),
        (r#"{"vmm": {}}"#, "missing field"),
        (&READ.replace("read", "raed").replace('{', r#"{"vmm": {"#), "Error parsing Json"),
        (&format!(r#"{{"vmm": {}}}"#, READ.replace("read", "raed")), "Invalid syscall name: raed"),
        (&format!(r#"{{"vmm": {}}}"#, READ.replace("trap", "allow")), "are equal"),
        (&format!(r#"{{"vmm": {READ}, "vmm": {READ}}}"#), "duplicate filter key"),
    ] {
        let refusal = refusal(text);
        assert!(refusal.starts_with("--seccomp-filter F: "), "{refusal}");
        assert!(refusal.contains(words), "{text}: {refusal}");
    }
}

#[test]
fn a_file_that_is_missing_or_endless_is_refused() {
    let refusal = |path: &str| Policies::from_file(&Source::Path(PathBuf::from(path))).err().unwrap();
    assert!(matches!(refusal("/nonexistent"), SeccompError::Read { .. }));
    let endless = refusal("/dev/zero").to_string();
    assert_eq!(endless, "--seccomp-filter /dev/zero: is larger than 1048576 bytes");
}

#[test]
fn every_kind_of_thread_has_a_policy_of_its_own() {
    let built_in = Policies::built_in();
    assert!(built_in.vmm != built_in.vcpu && built_in.vcpu != built_in.api && built_in.api != built_in.vmm);
    // Instructions that the kernel takes (BPF_MAXINSNS).
    for program in [&built_in.vmm, &built_in.vcpu, &built_in.api] {
        assert!((1..=4096).contains(&program.len()));
    }
}

#[test]
fn without_policies_nothing_is_filtered() {
    // Somebody else may have a policy for all that runs here.
    let filters = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().filter(|line| line.starts_with("Seccomp")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = filters();
    let none = Policies::none();
    for thread in [Thread::Vmm, Thread::Vcpu(0), Thread::Api] {
        none.install(thread).unwrap();
    }
    assert!(filters() == before && !before.is_empty(), "{before:?}");
}

/// This program once more, as a monitor with a bug in one kind of thread. How it ends is the C library's to say: it may
/// not send itself SIGABRT.
#[test]
fn a_panic_is_told_before_the_end() {
    const BUGGY: &str = "COFFERDAM_TEST_BUGGY_THREAD";
    let threads = [Thread::Vmm, Thread::Vcpu(7), Thread::Api];
    if let Ok(name) = env::var(BUGGY) {
        let thread = threads.into_iter().find(|thread| thread.to_string() == name).unwrap();
        violation::install().unwrap();
        Policies::built_in().install(thread).unwrap();
        panic!("a bug of {name}");
    }
    for thread in threads {
        let mut buggy = Command::new(env::current_exe().unwrap());
        buggy.args(["--nocapture", "--exact", "seccomp::tests::a_panic_is_told_before_the_end"]);
        let output = buggy.env(BUGGY, thread.to_string()).env_remove("RUST_BACKTRACE").output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("panicked at") && told.contains(&format!("a bug of {thread}\n")), "{output:?}");
        assert!(!output.status.success(), "{output:?}");
    }
}

/// What a program of seccomp answers to a call (Linux `Documentation/networking/filter.rst`).
fn answer(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [number, architecture].map(u32::to_ne_bytes).concat();
    data.resize(16, 0);
    data.extend(arguments.into_iter().flat_map(u64::to_ne_bytes));
    let (mut accumulator, mut at) = (0_u32, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { jt } else { jf });
        match code {
            0x20 => {
                accumulator = u32::from_ne_bytes(*data[k as usize..].first_chunk().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x06 => return k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}

/// Whether both answer alike, whatever the call.
fn alike(program: &[sock_filter], plain: &[sock_filter]) {
    const NATIVE: u32 = 0xc000_003e;
    let constants = plain.iter().map(|instruction| instruction.k).collect::<BTreeSet<_>>();
    let alike = |architecture, number, arguments| {
        assert_eq!(
            answer(program, architecture, number, arguments),
            answer(plain, architecture, number, arguments),
            "architecture {architecture:#x}, system call {number:#x}, arguments {arguments:x?}"
        );
    };
    let near = constants.iter().flat_map(|&k| [k.wrapping_sub(1), k, k.wrapping_add(1)]);
    // Those of x32 have a bit of their own.
    for number in (0..1024).chain(near.clone().flat_map(|k| [k, k | 0x4000_0000, !k])) {
        for architecture in [0, 0x4000_0003, NATIVE ^ 1] {
            alike(architecture, number, [0; 6]);
        }
        for &k in &constants {
            alike(NATIVE, number, [k.into(); 6]);
        }
    }
    let compared = plain.iter().filter(|instruction| instruction.code == 0x15).map(|compare| compare.k);
    for number in compared.filter(|number| *number < 1024) {
        for value in near.clone().flat_map(|k| [k.into(), u64::from(k) | 1 << 32, !u64::from(k)]) {
            for index in 0..6 {
                let mut arguments = [0; 6];
                arguments[index] = value;
                alike(NATIVE, number, arguments);
            }
        }
        for (&a, &b) in constants.iter().flat_map(|a| constants.iter().map(move |b| (a, b))) {
            alike(NATIVE, number, [a, b, a, b, a, b].map(u64::from));
        }
    }
}

#[test]
fn a_rearranged_program_answers_as_what_seccompiler_made() {
    const VMM: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/vmm.plain.rs"));
    const VCPU: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/vcpu.plain.rs"));
    const API: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/api.plain.rs"));
    let built_in = Policies::built_in();
    for (program, plain) in [(&built_in.vmm, VMM), (&built_in.vcpu, VCPU), (&built_in.api, API)] {
        assert!(program.len() < plain.len() / 2);
        alike(program, plain);
    }
}

#[test]
fn a_program_too_long_for_conditional_jumps_is_rearranged() {
    let conditions = r#"[{"index": 0, "type": "qword", "op": "gt", "val": 7},
        {"index": 5, "type": "dword", "op": "ne", "val": NUMBER}]"#;
    let rule = |call: Sysno| {
        let conditions = conditions.replace("NUMBER", &call.id().to_string());
        format!(r#"{{"syscall": "{}", "args": {conditions}}}"#, call.name())
    };
    let rules = Sysno::iter().filter(|call| (0..240).contains(&call.id())).step_by(5).map(rule);
    let rules = rules.collect::<Vec<_>>().join(",");
    let policy =
        READ.replace(r#""filter": ["#, &format!(r#""filter": [{rules},"#)).replace("trap", "kill_thread");
    let plain = compile(&format!(r#"{{"vmm": {policy}, "vcpu": {READ}, "api": {READ}}}"#)).unwrap().vmm;
    let program = search::by_halves(&plain).unwrap();
    assert!(program.iter().any(|instruction| instruction.code == 0x05 && instruction.k > 255));
    alike(&program, &plain);
}
