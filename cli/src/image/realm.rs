//! The realm that an image for Arm CCA is measured in: `--realm`.

use cofferdam_confidential::digest::cca::{HashAlgorithm, RealmParams, Rim};

/// Bits of RmiRealmFlags.
mod flags {
    pub const LPA2: u64 = 1 << 0;
    pub const SVE: u64 = 1 << 1;
    pub const PMU: u64 = 1 << 2;
}

/// Bytes of a granule.
const GRANULE: u64 = 0x1000;

/// What the host decides of a realm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealmArg {
    /// What is measured of it when it is made.
    pub params: RealmParams,
    /// RAM from the first address up to the second, for RMM 1.0, which measures that.
    ram: Option<(u64, u64)>,
}

impl RealmArg {
    /// Reads `ipa_bits=N,breakpoints=N,watchpoints=N[,…]`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut params = RealmParams {
            flags: 0,
            ipa_bits: 0,
            sve_vl: 0,
            num_bps: 0,
            num_wps: 0,
            pmu_num_ctrs: 0,
            hash_algo: HashAlgorithm::Sha256,
        };
        let (mut ram, mut rmm_1_0) = (None, false);
        let mut seen = Vec::new();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            if seen.contains(&key) {
                return Err(format!("{key} is given twice"));
            }
            seen.push(key);
            match key {
                "ipa_bits" => params.ipa_bits = number(key, value, 32, 52)?,
                // Both count from 0 in a realm's parameters.
                "breakpoints" => params.num_bps = number(key, value, 2, 64)?.saturating_sub(1),
                "watchpoints" => params.num_wps = number(key, value, 2, 64)?.saturating_sub(1),
                "pmu_counters" => {
                    params.pmu_num_ctrs = number(key, value, 0, 31)?;
                    params.flags |= flags::PMU;
                }
                "sve_bits" => {
                    params.sve_vl = sve_vector_length(value)?;
                    params.flags |= flags::SVE;
                }
                "lpa2" if value.is_empty() => params.flags |= flags::LPA2,
                "hash" => params.hash_algo = hash(value)?,
                "rmm" => {
                    rmm_1_0 = match value {
                        "1.0" => true,
                        "2.0" => false,
                        _ => return Err(format!("rmm is 1.0 or 2.0, not {value:?}")),
                    }
                }
                "ram" => ram = Some(range(value)?),
                _ => return Err(format!("unknown: {part:?}")),
            }
        }
        for key in ["ipa_bits", "breakpoints", "watchpoints"] {
            if !seen.contains(&key) {
                return Err(format!("{key} is missing"));
            }
        }
        match (rmm_1_0, ram) {
            (true, None) => Err("RMM 1.0 measures where RAM is: ram=START+SIZE is missing".to_owned()),
            (false, Some(_)) => Err("RMM 2.0 does not measure where RAM is: without ram=".to_owned()),
            (_, Some((_, top))) if top > 1 << params.ipa_bits => {
                Err(format!("ram ends at {top:#x}, beyond {} bits", params.ipa_bits))
            }
            _ => Ok(Self { params, ram }),
        }
    }

    /// The measurement of the realm before anything is in it.
    pub fn rim(&self) -> Rim {
        let mut rim = Rim::new(&self.params);
        if let Some((base, top)) = self.ram {
            rim.init_ripas(base, top);
        }
        rim
    }
}

fn number(key: &str, value: &str, min: u8, max: u8) -> Result<u8, String> {
    let number = value.parse().ok().filter(|number| (min..=max).contains(number));
    number.ok_or_else(|| format!("{key} is a number from {min} to {max}, not {value:?}"))
}

/// The length in units of 128 bits, less one.
fn sve_vector_length(value: &str) -> Result<u8, String> {
    let length = ["128", "256", "512", "1024", "2048"].iter().position(|bits| *bits == value);
    let vl = length.and_then(|doublings| [0, 1, 3, 7, 15].get(doublings).copied());
    vl.ok_or_else(|| format!("sve_bits is a power of two from 128 to 2048, not {value:?}"))
}

fn hash(value: &str) -> Result<HashAlgorithm, String> {
    match value {
        "sha256" => Ok(HashAlgorithm::Sha256),
        "sha384" => Ok(HashAlgorithm::Sha384),
        "sha512" => Ok(HashAlgorithm::Sha512),
        _ => Err(format!("hash is sha256, sha384 or sha512, not {value:?}")),
    }
}

/// Reads `START+SIZE`, both hexadecimal with 0x, in whole granules.
fn range(value: &str) -> Result<(u64, u64), String> {
    let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let whole = |number: &u64| number.is_multiple_of(GRANULE);
    let read = || {
        let (start, size) = value.split_once('+')?;
        let (start, size) = (hex(start).filter(whole)?, hex(size).filter(whole)?);
        Some((start, start.checked_add(size)?))
    };
    read().ok_or_else(|| {
        format!("ram is START+SIZE in multiples of 0x1000, such as 0x80000000+0x20000000, not {value:?}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_realm_is_read() {
        let realm = RealmArg::parse("ipa_bits=48,breakpoints=2,watchpoints=6").unwrap();
        let params = RealmParams {
            flags: 0,
            ipa_bits: 48,
            sve_vl: 0,
            num_bps: 1,
            num_wps: 5,
            pmu_num_ctrs: 0,
            hash_algo: HashAlgorithm::Sha256,
        };
        assert_eq!(realm, RealmArg { params, ram: None });
        assert_eq!(realm.rim(), Rim::new(&params));

        let text = "rmm=1.0,ram=0x80000000+0x20000000,hash=sha512,lpa2,sve_bits=2048,pmu_counters=6,\
                    ipa_bits=33,breakpoints=64,watchpoints=2";
        let realm = RealmArg::parse(text).unwrap();
        let params = RealmParams {
            flags: 7,
            ipa_bits: 33,
            sve_vl: 15,
            num_bps: 63,
            num_wps: 1,
            pmu_num_ctrs: 6,
            hash_algo: HashAlgorithm::Sha512,
        };
        assert_eq!(realm, RealmArg { params, ram: Some((0x8000_0000, 0xa000_0000)) });
        let mut rim = Rim::new(&params);
        rim.init_ripas(0x8000_0000, 0xa000_0000);
        assert_eq!(realm.rim(), rim);
    }

    #[test]
    fn bad_realms_are_refused() {
        let cases = [
            ("", "unknown: \"\""),
            ("ipa_bits=40", "breakpoints is missing"),
            ("ipa_bits=53", "ipa_bits is a number from 32 to 52, not \"53\""),
            ("breakpoints=1", "breakpoints is a number from 2 to 64, not \"1\""),
            ("watchpoints=x", "watchpoints is a number from 2 to 64, not \"x\""),
            ("pmu_counters=32", "pmu_counters is a number from 0 to 31, not \"32\""),
            ("sve_bits=384", "sve_bits is a power of two from 128 to 2048, not \"384\""),
            ("lpa2=1", "unknown: \"lpa2=1\""),
            ("lpa2,lpa2", "lpa2 is given twice"),
            ("hash=md5", "hash is sha256, sha384 or sha512, not \"md5\""),
            ("rmm=3", "rmm is 1.0 or 2.0, not \"3\""),
        ];
        for (text, message) in cases {
            assert_eq!(RealmArg::parse(text).unwrap_err(), message);
        }
        let ram = |ram: &str| {
            RealmArg::parse(&format!("ipa_bits=32,breakpoints=2,watchpoints=2,{ram}")).unwrap_err()
        };
        assert_eq!(ram("rmm=1.0"), "RMM 1.0 measures where RAM is: ram=START+SIZE is missing");
        assert_eq!(ram("ram=0x0+0x1000"), "RMM 2.0 does not measure where RAM is: without ram=");
        assert_eq!(ram("rmm=1.0,ram=0x0+0x100001000"), "ram ends at 0x100001000, beyond 32 bits");
        for odd in ["0x0", "0+0x1000", "0x0+0x1001", "0x1+0x1000", "0xfffffffffffff000+0x1000", "+"] {
            assert!(
                ram(&format!("rmm=1.0,ram={odd}")).starts_with("ram is START+SIZE in multiples"),
                "{odd}"
            );
        }
    }
}
