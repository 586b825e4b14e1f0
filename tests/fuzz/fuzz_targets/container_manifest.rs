//! Container manifests, as a guest reads them.
//!
//! Holds: what is accepted is the one encoding of what it means, and values for a start are taken or refused.
#![no_main]

use arbitrary::Arbitrary;
use cofferdam_container_manifest::{decode, encode};
use libfuzzer_sys::fuzz_target;

const GOOD: &str = concat!(
    r#"{"host":{"exec":[["/bin/health"]],"signals":["INT","TERM"],"stderr":true,"stdin":false,"stdout":true,"#,
    r#""stop":{"signal":"TERM","timeout_ms":10000}},"hostname":"a","layers":[{"root_hash":"#,
    r#""abababababababababababababababababababababababababababababababab","salt":"0001","size":8192}],"#,
    r#""mounts":[{"scratch":{"path":"/var"}},{"tmpfs":{"path":"/tmp","size":4096}}],"on_verity_failure":"kill","#,
    r#""process":{"args":["/bin/sh"],"capabilities":["CAP_CHOWN"],"cwd":"/","env":["MODE=fast"],"gid":0,"#,
    r#""groups":[1],"no_new_privs":false,"read_only_root":false,"rlimits":[{"hard":null,"name":"RLIMIT_NOFILE","#,
    r#""soft":1024}],"start_env":[{"name":"MODE","pattern":"(fast|slow)+"}],"terminal":false,"uid":1000},"#,
    r#""scratch":{"protection":"authenticated","size":4096},"version":1}"#,
);

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Raw(&'a [u8]),
    /// A good manifest in which pieces are replaced by others: place, length, content; and values for a start.
    Changed(Vec<(u16, u8, Piece<'a>)>, Vec<(&'a str, &'a str)>),
}

#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Text(&'a str),
    Number(u64),
    /// A piece of the good one.
    Own(u16, u8),
}

fn slice(text: &[u8], at: u16, length: u8) -> std::ops::Range<usize> {
    let start = usize::from(at) % (text.len() + 1);
    start..text.len().min(start + usize::from(length))
}

fuzz_target!(|input: Input<'_>| {
    assert!(decode(GOOD.as_bytes()).is_ok());
    let (bytes, given) = match input {
        Input::Raw(bytes) => (bytes.to_vec(), vec![]),
        Input::Changed(changes, given) => {
            let mut bytes = GOOD.as_bytes().to_vec();
            for (at, length, piece) in changes {
                let piece = match piece {
                    Piece::Text(text) => text.as_bytes().to_vec(),
                    Piece::Number(number) => number.to_string().into_bytes(),
                    Piece::Own(at, length) => GOOD.as_bytes()[slice(GOOD.as_bytes(), at, length)].to_vec(),
                };
                let place = slice(&bytes, at, length);
                bytes.splice(place, piece);
            }
            (bytes, given)
        }
    };
    if let Ok(manifest) = decode(&bytes) {
        assert_eq!(encode(&manifest).unwrap(), bytes);
        let given: Vec<_> =
            given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        if let Ok(env) = manifest.process.start_environment(&given) {
            assert!(given.iter().all(|(name, value)| env.contains(&format!("{name}={value}"))));
        }
    }
});
