use super::*;
use std::path::PathBuf;

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
    let none = Policies::none();
    for thread in [Thread::Vmm, Thread::Vcpu(0), Thread::Api] {
        none.install(thread).unwrap();
    }
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(status.contains("Seccomp:\t0"), "{status}");
}
