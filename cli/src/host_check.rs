//! `cofferdam host check`: what this machine can do.

use std::fmt::Write as _;
use std::io::{self, Write};

use cofferdam_confidential::host::survey::{Check, Platforms, Survey, snp};

use crate::say::coloured;

/// Prints what this machine can do. Returns 0 if a plain domain can run here, else 125.
pub fn check(as_json: bool) -> u8 {
    let survey = Survey::of_this_host(true);
    let text = if as_json { json_form(&survey) } else { text_form(&survey, coloured(&io::stdout())) };
    // Who closed standard output still gets the exit code.
    let _ = io::stdout().lock().write_all(text.as_bytes());
    if survey.platforms.plain { 0 } else { 125 }
}

fn json_form(survey: &Survey) -> String {
    // Names, flags and texts are always JSON.
    let report = serde_json::to_string(survey).unwrap_or_default();
    format!("{report}\n")
}

/// One line per check, aligned; the capabilities that are there share one, and where there is no SEV-SNP, one says why.
fn text_form(survey: &Survey, coloured: bool) -> String {
    let is_capability = |check: &&Check| check.name.starts_with("KVM_CAP_");
    let needed = survey.checks.iter().filter(is_capability).count();
    let present = survey.checks.iter().filter(is_capability).filter(|check| check.ok).count();
    let summary = Check {
        name: "kvm_capabilities",
        ok: present == needed,
        reason: format!("{present} of the {needed} that a domain needs"),
        remedy: None,
    };
    let has_snp = survey.checks.iter().any(|check| check.name == "snp" && check.ok);
    let mut rows = Vec::new();
    for check in &survey.checks {
        // Without KVM none is there, and the line about KVM says why.
        if is_capability(&check) && (check.ok || present == 0) {
            continue;
        }
        if check.name.starts_with(snp::DETAILS) && !has_snp {
            continue;
        }
        rows.push(check);
        if check.name == "kvm" {
            rows.push(&summary);
        }
    }
    let width = rows.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:width$}  {}  {}", check.name, answer(check.ok, coloured), check.reason);
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(text, "{:width$}       {remedy}", "");
        }
    }
    let _ = writeln!(text, "\n{}", conclusion(survey.platforms));
    text
}

fn answer(ok: bool, coloured: bool) -> &'static str {
    match (ok, coloured) {
        (true, true) => "\x1b[32myes\x1b[0m",
        (false, true) => "\x1b[31mno\x1b[0m ",
        (true, false) => "yes",
        (false, false) => "no ",
    }
}

fn conclusion(platforms: Platforms) -> String {
    let Platforms { plain, snp, tdx, cca } = platforms;
    if !plain {
        return "No domain can run on this host.".to_owned();
    }
    let protected: Vec<&str> = [("SEV-SNP", snp), ("TDX", tdx), ("CCA", cca)]
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect();
    match protected.as_slice() {
        [] => "Plain domains (not protected) can run on this host.".to_owned(),
        names => format!("Plain domains can run on this host, and it offers {}.", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn survey(plain: bool) -> Survey {
        with_snp(plain, false)
    }

    fn with_snp(plain: bool, snp: bool) -> Survey {
        let check = |name, ok: bool| Check {
            name,
            ok,
            reason: format!("why {name}"),
            remedy: (!ok).then(|| format!("mend {name}")),
        };
        Survey {
            checks: vec![
                check("kvm", true),
                check("KVM_CAP_A", true),
                check("KVM_CAP_B", plain),
                check("snp", snp),
                check("snp_firmware", snp),
            ],
            platforms: Platforms { plain, ..Platforms::default() },
        }
    }

    #[test]
    fn text_is_aligned_and_short() {
        assert_eq!(
            text_form(&survey(true), false),
            "kvm               yes  why kvm\n\
             kvm_capabilities  yes  2 of the 2 that a domain needs\n\
             snp               no   why snp\n\
             \x20                      mend snp\n\
             \nPlain domains (not protected) can run on this host.\n"
        );
        let missing = text_form(&survey(false), false);
        assert!(missing.contains("KVM_CAP_B         no   why KVM_CAP_B\n"), "{missing}");
        assert!(missing.ends_with("No domain can run on this host.\n"));
        let details = text_form(&with_snp(true, true), false);
        assert!(details.contains("snp_firmware      yes  why snp_firmware\n"), "{details}");
        assert!(text_form(&survey(true), true).contains("\x1b[32myes\x1b[0m"));
    }

    #[test]
    fn json_has_the_documented_shape() {
        let value: serde_json::Value = serde_json::from_str(&json_form(&survey(true))).unwrap();
        assert_eq!(
            value["checks"][3],
            json!({"name": "snp", "ok": false, "reason": "why snp", "remedy": "mend snp"})
        );
        assert_eq!(value["checks"][0]["remedy"], json!(null));
        assert_eq!(value["platforms"], json!({"plain": true, "snp": false, "tdx": false, "cca": false}));
    }
}
