//! Manifests, good and bad: one encoding, one digest, and a named reason for everything that is refused.

use cofferdam_container_manifest::{
    DataVolume, DecodeError, Host, Layer, MAX_BYTES, MAX_COMMANDS, MAX_GROUPS, MAX_LAYERS, MAX_MOUNTS,
    MAX_START_VARIABLES, MAX_VOLUMES, MAX_WORDS, MAX_WORDS_BYTES, Manifest, ManifestError, Mount,
    OnVerityFailure, Problem, Process, Protection, Rlimit, RootHash, Salt, Scratch, ScratchVolume, Signal,
    StartError, StartVariable, Stop, Tmpfs, decode, digest, encode,
};
use proptest::prelude::*;
use serde_json::Value;

fn layer() -> Layer {
    Layer { root_hash: RootHash([0xab; 32]), salt: Salt(vec![0, 1]), size: 8192 }
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

fn good() -> Manifest {
    let volume = DataVolume {
        path: "/srv/data".to_owned(),
        root_hash: RootHash([1; 32]),
        salt: Salt(vec![]),
        size: 4096,
    };
    Manifest {
        host: Host {
            exec: vec![words(&["/bin/health", "--quick"])],
            signals: vec![Signal::Int, Signal::Term],
            stderr: true,
            stdin: false,
            stdout: true,
            stop: Some(Stop { signal: Signal::Term, timeout_ms: 10_000 }),
        },
        hostname: "web-1.example".to_owned(),
        layers: vec![layer()],
        mounts: vec![
            Mount::Data(volume),
            Mount::Scratch(ScratchVolume { path: "/var/lib".to_owned() }),
            Mount::Tmpfs(Tmpfs { path: "/tmp".to_owned(), size: 1 << 20 }),
        ],
        on_verity_failure: OnVerityFailure::Kill,
        process: Process {
            args: words(&["/bin/\"sh\"", "\u{1}\u{7f}\n\u{e9}\u{2028}"]),
            capabilities: words(&["CAP_CHOWN", "CAP_KILL"]),
            cwd: "/".to_owned(),
            env: words(&["PATH=/bin", "MODE=fast", "EMPTY="]),
            gid: 0,
            groups: vec![1, 5],
            no_new_privs: false,
            read_only_root: false,
            rlimits: vec![Rlimit { hard: None, name: "RLIMIT_NOFILE".to_owned(), soft: Some(1024) }],
            start_env: vec![
                StartVariable { name: "MODE".to_owned(), pattern: "fast|slow".to_owned() },
                StartVariable { name: "REQUEST".to_owned(), pattern: "[0-9a-f]{8}".to_owned() },
            ],
            terminal: false,
            uid: 1000,
        },
        scratch: Some(Scratch { protection: Protection::Authenticated, size: 1 << 30 }),
        version: 1,
    }
}

/// The one encoding, byte by byte: changing it changes the digest of every manifest.
#[test]
fn the_encoding_is_fixed() {
    let encoded = encode(&good()).unwrap();
    let expected = concat!(
        r#"{"host":{"exec":[["/bin/health","--quick"]],"signals":["INT","TERM"],"stderr":true,"stdin":false,"#,
        r#""stdout":true,"stop":{"signal":"TERM","timeout_ms":10000}},"hostname":"web-1.example","layers":"#,
        r#"[{"root_hash":"abababababababababababababababababababababababababababababababab","salt":"0001","#,
        r#""size":8192}],"mounts":[{"data":{"path":"/srv/data","root_hash":"#,
        r#""0101010101010101010101010101010101010101010101010101010101010101","salt":"","size":4096}},"#,
        r#"{"scratch":{"path":"/var/lib"}},{"tmpfs":{"path":"/tmp","size":1048576}}],"on_verity_failure":"kill","#,
        r#""process":{"args":["/bin/\"sh\"","\u0001"#,
        "\u{7f}",
        r"\n",
        "\u{e9}\u{2028}",
        r#""],"capabilities":["CAP_CHOWN","CAP_KILL"],"cwd":"/","env":["PATH=/bin","MODE=fast","EMPTY="],"gid":0,"#,
        r#""groups":[1,5],"no_new_privs":false,"read_only_root":false,"rlimits":[{"hard":null,"name":"#,
        r#""RLIMIT_NOFILE","soft":1024}],"start_env":[{"name":"MODE","pattern":"fast|slow"},{"name":"REQUEST","#,
        r#""pattern":"[0-9a-f]{8}"}],"terminal":false,"uid":1000},"scratch":{"protection":"authenticated","#,
        r#""size":1073741824},"version":1}"#,
    );
    assert_eq!(String::from_utf8(encoded.clone()).unwrap(), expected);
    // As `sha256sum manifest.json` says.
    let hex: String = digest(&encoded).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "709aeb549cbd4520ce5384469ede71b325367bcb73e65311b30100e94727ad63");
}

/// Fields are in the order of their names at every level, as RFC 8785 wants.
#[test]
fn fields_are_sorted() {
    fn in_order(text: &str) -> bool {
        // serde_json hands members out in the order of the text.
        struct Order;
        impl<'de> serde::de::Visitor<'de> for Order {
            type Value = bool;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }
            fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_str<E>(self, _: &str) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_unit<E>(self) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
                let mut good = true;
                while let Some(Checked(element)) = seq.next_element()? {
                    good &= element;
                }
                Ok(good)
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
                let (mut good, mut last) = (true, String::new());
                while let Some((name, Checked(value))) = map.next_entry::<String, Checked>()? {
                    good &= value && last < name;
                    last = name;
                }
                Ok(good)
            }
        }
        struct Checked(bool);
        impl<'de> serde::Deserialize<'de> for Checked {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Order).map(Self)
            }
        }
        serde_json::from_str::<Checked>(text).unwrap().0
    }
    assert!(!in_order(r#"{"a":[{"c":1,"b":2}]}"#));
    assert!(in_order(std::str::from_utf8(&encode(&good()).unwrap()).unwrap()));
}

#[test]
fn other_ways_to_write_the_same_are_refused() {
    let encoded = String::from_utf8(encode(&good()).unwrap()).unwrap();
    assert_eq!(decode(encoded.as_bytes()).unwrap(), good());
    let others = [
        format!("{encoded}\n"),
        format!(" {encoded}"),
        encoded.replace(r#""size":8192"#, r#""size": 8192"#),
        encoded.replace("/bin/health", r"\/bin/health"),
        encoded.replace('\u{e9}', r"\u00e9"),
        encoded.replace(r#""salt":"0001","size":8192"#, r#""size":8192,"salt":"0001""#),
    ];
    for other in others {
        assert_ne!(other, encoded);
        assert!(matches!(decode(other.as_bytes()), Err(DecodeError::NotCanonical(_))), "{other}");
    }
    let missing = encoded.replace(r#""hard":null,"#, "");
    assert!(
        matches!(decode(missing.as_bytes()), Err(DecodeError::NotCanonical(_))),
        "a field that may be null"
    );
}

#[test]
fn other_schemas_are_refused() {
    let encoded = String::from_utf8(encode(&good()).unwrap()).unwrap();
    let others = [
        encoded.replace(r#""uid":1000"#, r#""uid":1000.0"#),
        encoded.replace(r#""uid":1000"#, r#""uid":-1"#),
        encoded.replace(r#""uid":1000"#, r#""uid":4294967296"#),
        encoded.replace(r#""uid":1000"#, r#""uid":1000,"uid":1000"#),
        encoded.replace(r#""uid":1000"#, r#""uid":1000,"umask":18"#),
        encoded.replace(r#""stdin":false,"#, ""),
        encoded.replace(r#""stdin":false"#, r#""stdin":false,"files":true"#),
        encoded.replace(r#""tmpfs":{"#, r#""tmpfs":{"mode":1777,"#),
        encoded.replace(r#""tmpfs":"#, r#""bind":"#),
        encoded.replace(
            r#"{"scratch":{"path":"/var/lib"}},{"tmpfs""#,
            r#"{"scratch":{"path":"/var/lib"},"tmpfs""#,
        ),
        encoded.replace("abababab", "ABABABAB"),
        encoded.replace(r#""INT""#, r#""SEGV""#),
        encoded.replace("authenticated", "maybe"),
        format!("{encoded}{encoded}"),
        String::new(),
        "[]".to_owned(),
    ];
    for other in others {
        assert_ne!(other, encoded);
        assert!(matches!(decode(other.as_bytes()), Err(DecodeError::Schema(_))), "{other}");
    }
    assert!(matches!(decode(&[0xff]), Err(DecodeError::Schema(_))));
    // The version is looked at first, because another one may have other fields.
    let newer = encoded.replace(r#""version":1"#, r#""version":2,"more":{}"#);
    assert!(matches!(decode(newer.as_bytes()), Err(DecodeError::Version(2))));
    assert!(matches!(decode(&vec![b' '; MAX_BYTES + 1]), Err(DecodeError::TooLong(_))));
}

/// What is refused of a manifest that is good but for what `change` does: the field, and the problem.
fn refused(change: impl FnOnce(&mut Manifest)) -> (String, Problem) {
    let mut manifest = good();
    change(&mut manifest);
    match encode(&manifest) {
        Err(ManifestError::Field { field, problem }) => (field, problem),
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn versions_names_and_numbers() {
    assert_eq!(refused(|m| m.version = 2), ("version".to_owned(), Problem::Version(2)));
    let long = "a".repeat(65);
    for name in ["", "-a", "a-", "a..b", ".a", "a.", "a_b", "\u{e9}", "a b", "a.-b", &long] {
        assert_eq!(
            refused(|m| m.hostname = name.to_owned()),
            ("hostname".to_owned(), Problem::Hostname(name.to_owned()))
        );
    }
    for size in [0, 4095, 4097, 1 << 53] {
        assert_eq!(refused(|m| m.layers[0].size = size), ("layers[0].size".to_owned(), Problem::Size(size)));
        let scratch = Some(Scratch { protection: Protection::None, size });
        assert_eq!(refused(|m| m.scratch = scratch), ("scratch.size".to_owned(), Problem::Size(size)));
        let tmpfs = Mount::Tmpfs(Tmpfs { path: "/tmp".to_owned(), size });
        assert_eq!(refused(|m| m.mounts[2] = tmpfs), ("mounts[2].size".to_owned(), Problem::Size(size)));
        let Mount::Data(volume) = good().mounts[0].clone() else { panic!() };
        let volume = Mount::Data(DataVolume { size, ..volume });
        assert_eq!(refused(|m| m.mounts[0] = volume), ("mounts[0].size".to_owned(), Problem::Size(size)));
    }
    let id = Problem::NoId(u32::MAX);
    assert_eq!(refused(|m| m.process.uid = u32::MAX), ("process.uid".to_owned(), id));
    assert_eq!(refused(|m| m.process.gid = u32::MAX).0, "process.gid");
    assert_eq!(refused(|m| m.process.groups = vec![u32::MAX]).0, "process.groups");
    let stop = Some(Stop { signal: Signal::Term, timeout_ms: 3_600_001 });
    let problem = Problem::TooLarge { value: 3_600_001, max: 3_600_000 };
    assert_eq!(refused(|m| m.host.stop = stop), ("host.stop.timeout_ms".to_owned(), problem));
}

#[test]
fn sets_are_sorted() {
    let not = |field: &str| (field.to_owned(), Problem::NotSorted);
    for signals in [vec![Signal::Term, Signal::Int], vec![Signal::Int, Signal::Int]] {
        assert_eq!(refused(|m| m.host.signals = signals), not("host.signals"));
    }
    assert_eq!(refused(|m| m.process.capabilities.reverse()), not("process.capabilities"));
    assert_eq!(refused(|m| m.process.groups = vec![5, 5]), not("process.groups"));
    assert_eq!(refused(|m| m.process.start_env.reverse()), not("process.start_env"));
    assert_eq!(refused(|m| m.process.rlimits.push(m.process.rlimits[0].clone())), not("process.rlimits"));
}

#[test]
fn limits_and_capabilities_of_linux() {
    let (field, problem) = refused(|m| m.process.capabilities[1] = "CAP_TIME_TRAVEL".to_owned());
    assert_eq!(
        (field.as_str(), problem),
        ("process.capabilities[1]", Problem::Unknown("CAP_TIME_TRAVEL".to_owned()))
    );
    let (field, problem) = refused(|m| m.process.rlimits[0].name = "NOFILE".to_owned());
    assert_eq!((field.as_str(), problem), ("process.rlimits[0].name", Problem::Unknown("NOFILE".to_owned())));
    for (soft, hard) in [(Some(2), Some(1)), (None, Some(1))] {
        let limit = Rlimit { hard, name: "RLIMIT_CORE".to_owned(), soft };
        let (field, problem) = refused(|m| m.process.rlimits[0] = limit);
        assert_eq!((field.as_str(), problem), ("process.rlimits[0]", Problem::SoftAboveHard));
    }
    assert_eq!(
        refused(|m| m.process.rlimits[0].soft = Some(1 << 53)).1,
        Problem::TooLarge { value: 1 << 53, max: (1 << 53) - 1 }
    );
}

#[test]
fn paths_that_escape() {
    let long = format!("/{}", "a/".repeat(2048));
    let long_name = format!("/{}", "a".repeat(256));
    for path in ["", "tmp", "/../etc", "/a/..", "/a/./b", "/a//b", "/a/", "//", long_name.as_str()] {
        let bad = Problem::Path(path.to_owned());
        assert_eq!(refused(|m| m.process.cwd = path.to_owned()), ("process.cwd".to_owned(), bad));
        let volume = Mount::Scratch(ScratchVolume { path: path.to_owned() });
        let bad = Problem::Path(path.to_owned());
        assert_eq!(refused(|m| m.mounts[1] = volume), ("mounts[1].path".to_owned(), bad));
    }
    assert!(matches!(refused(|m| m.process.cwd = long).1, Problem::Length { max: 4095, .. }));
    assert_eq!(refused(|m| m.process.cwd = "/a\0b".to_owned()).1, Problem::ZeroByte);
}

#[test]
fn mounts_that_clash() {
    let tmpfs = |path: &str| Mount::Tmpfs(Tmpfs { path: path.to_owned(), size: 4096 });
    let with = |mounts: Vec<Mount>| refused(|m| m.mounts = mounts);
    assert_eq!(with(vec![tmpfs("/")]), ("mounts[0].path".to_owned(), Problem::Root));
    let problem = Problem::MountedTwice("/a".to_owned());
    assert_eq!(with(vec![tmpfs("/a"), tmpfs("/a")]), ("mounts[1].path".to_owned(), problem));
    let problem = Problem::Hides("/a/b".to_owned());
    assert_eq!(with(vec![tmpfs("/a/b"), tmpfs("/a")]), ("mounts[1].path".to_owned(), problem));
    assert_eq!(refused(|m| m.scratch = None), ("mounts[1]".to_owned(), Problem::NoScratch));
    let mut manifest = good();
    manifest.mounts = vec![tmpfs("/bc"), tmpfs("/b"), tmpfs("/a"), tmpfs("/a/b"), tmpfs("/ab")];
    assert!(encode(&manifest).is_ok());
}

#[test]
fn arguments_and_environment() {
    let problem = Problem::Count { count: 0, min: 1, max: MAX_WORDS };
    assert_eq!(refused(|m| m.process.args.clear()), ("process.args".to_owned(), problem));
    assert_eq!(refused(|m| m.process.args[0].clear()), ("process.args[0]".to_owned(), Problem::Empty));
    assert_eq!(
        refused(|m| m.process.args[1] = "a\0".to_owned()),
        ("process.args[1]".to_owned(), Problem::ZeroByte)
    );
    assert_eq!(refused(|m| m.host.exec[0].clear()).0, "host.exec[0]");
    assert_eq!(refused(|m| m.host.exec[0][0].clear()), ("host.exec[0][0]".to_owned(), Problem::Empty));
    let long = |bytes: usize| words(&["/a", &"a".repeat(bytes - 4)]);
    let mut manifest = good();
    manifest.process.args = long(MAX_WORDS_BYTES);
    encode(&manifest).unwrap();
    let bad = refused(|m| m.process.args = long(MAX_WORDS_BYTES + 1));
    assert_eq!(bad.1, Problem::WordsBytes(MAX_WORDS_BYTES + 1));
    for entry in ["", "A", "=a"] {
        let bad = refused(|m| m.process.env[1] = entry.to_owned());
        assert_eq!(bad, ("process.env[1]".to_owned(), Problem::Variable));
    }
    let problem = Problem::Twice("PATH".to_owned());
    assert_eq!(
        refused(|m| m.process.env[2] = "PATH=/sbin".to_owned()),
        ("process.env[2]".to_owned(), problem)
    );
    assert_eq!(refused(|m| m.process.env[2] = "A=\0".to_owned()).1, Problem::ZeroByte);
}

/// Each list holds its greatest number of elements, and not one more.
#[test]
fn greatest_numbers() {
    fn check(max: usize, change: impl Fn(&mut Manifest, usize)) {
        let mut manifest = good();
        change(&mut manifest, max);
        encode(&manifest).unwrap();
        assert!(
            matches!(refused(|m| change(m, max + 1)).1, Problem::Count { max: stated, .. } if stated == max)
        );
    }
    let volume = |index: usize| {
        let Mount::Data(volume) = good().mounts[0].clone() else { panic!() };
        Mount::Data(DataVolume { path: format!("/{index}"), ..volume })
    };
    check(MAX_LAYERS, |m, count| m.layers = vec![layer(); count]);
    assert_eq!(refused(|m| m.layers.clear()).1, Problem::Count { count: 0, min: 1, max: MAX_LAYERS });
    check(MAX_MOUNTS, |m, count| {
        m.mounts = (0..count).map(|at| Mount::Tmpfs(Tmpfs { path: format!("/{at}"), size: 4096 })).collect();
    });
    check(MAX_VOLUMES, |m, count| m.mounts = (0..count).map(volume).collect());
    check(MAX_WORDS, |m, count| m.process.args = vec!["a".to_owned(); count]);
    check(MAX_WORDS, |m, count| m.process.env = (0..count).map(|at| format!("{at}=")).collect());
    check(MAX_COMMANDS, |m, count| m.host.exec = vec![words(&["a"]); count]);
    check(MAX_GROUPS, |m, count| m.process.groups = (0..u32::try_from(count).unwrap()).collect());
    check(MAX_START_VARIABLES, |m, count| {
        m.process.start_env = (0..count)
            .map(|at| StartVariable { name: format!("A{at:03}"), pattern: String::new() })
            .collect();
    });
}

#[test]
fn a_manifest_that_would_be_too_long() {
    let mut manifest = good();
    // Each of these bytes is written as six.
    manifest.process.args = words(&["a", &"\u{1}".repeat(100 << 10)]);
    manifest.host.exec = vec![manifest.process.args.clone()];
    assert!(matches!(encode(&manifest), Err(ManifestError::TooLong(_))));
}

#[test]
fn start_variables() {
    for name in ["", "A=B", "A\0"] {
        let bad = refused(|m| m.process.start_env[0].name = name.to_owned());
        let problem = Problem::VariableName(name.to_owned());
        assert_eq!(bad, ("process.start_env[0].name".to_owned(), problem));
    }
    assert!(matches!(
        refused(|m| m.process.start_env[1].name = "S".repeat(256)),
        (field, Problem::Length { length: 256, max: 255 }) if field == "process.start_env[1].name"
    ));
    let bad = refused(|m| m.process.start_env[1].pattern = "(".to_owned());
    assert_eq!(bad, ("process.start_env[1].pattern".to_owned(), Problem::Pattern("(".to_owned())));
    assert!(matches!(
        refused(|m| m.process.start_env[1].pattern = "a".repeat(1025)).1,
        Problem::Length { length: 1025, max: 1024 }
    ));

    let start = |given: &[(&str, &str)]| {
        let given: Vec<_> =
            given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        good().process.start_environment(&given)
    };
    assert_eq!(start(&[]).unwrap(), good().process.env);
    assert_eq!(
        start(&[("REQUEST", "0123abcd"), ("MODE", "slow")]).unwrap(),
        ["PATH=/bin", "MODE=slow", "EMPTY=", "REQUEST=0123abcd"]
    );
    assert_eq!(start(&[("PATH", "/tmp")]), Err(StartError::Undeclared("PATH".to_owned())));
    assert_eq!(start(&[("MODE", "fast"), ("MODE", "slow")]), Err(StartError::Twice("MODE".to_owned())));
    let mismatch = StartError::Mismatch { name: "MODE".to_owned(), pattern: "fast|slow".to_owned() };
    assert_eq!(start(&[("MODE", "faster")]), Err(mismatch));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is changed in a good file: it is refused, or means something else and is the encoding of that.
    #[test]
    fn changed_bytes_never_mean_the_same(at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = encode(&good()).unwrap();
        let at = at.index(bytes.len());
        prop_assume!(bytes[at] != byte);
        bytes[at] = byte;
        if let Ok(manifest) = decode(&bytes) {
            prop_assert_ne!(&manifest, &good());
            prop_assert_eq!(encode(&manifest).unwrap(), bytes);
        }
    }

    #[test]
    fn what_is_encoded_is_decoded(
        words in prop::collection::vec("[^\0]{1,20}", 1..20),
        size in 1_u64..1 << 40,
        hash: [u8; 32],
        salt in prop::collection::vec(any::<u8>(), 0..256),
        uid in 0..u32::MAX,
        flags: [bool; 4],
    ) {
        let mut manifest = good();
        manifest.process.args = words;
        manifest.process.uid = uid;
        manifest.layers.push(Layer { root_hash: RootHash(hash), salt: Salt(salt), size: size * 4096 });
        [manifest.host.stdin, manifest.host.stdout, manifest.process.terminal, manifest.process.read_only_root] = flags;
        let bytes = encode(&manifest).unwrap();
        prop_assert_eq!(decode(&bytes).unwrap(), manifest);
        // Any reader of JSON understands it, and writes it back the same.
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(serde_json::to_vec(&value).unwrap(), bytes);
    }
}
