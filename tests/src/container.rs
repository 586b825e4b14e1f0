//! A container in a domain of its own: the shipped init and Debian's cloud kernel, or the small one, in an image, layers made by `cofferdam container
//! build`, and the host's side of the streams.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cofferdam_api::config::DEFAULT_COMMAND_LINE;
use cofferdam_container_manifest::{
    self as manifest, Host, Layer, Manifest, OnVerityFailure, Process, Signal, Stop,
};
use cofferdam_container_protocol::drive;
use tempfile::TempDir;
use xtask::assets::Assets;

use crate::{Finished, Run, Running, place};

/// What all containers of these tests share, made once.
struct Shared {
    folder: TempDir,
    layers: Vec<(Layer, PathBuf)>,
}

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Names of busybox in the lowest layer.
const APPLETS: [&str; 43] = [
    "sh",
    "cat",
    "chmod",
    "chown",
    "cut",
    "dd",
    "df",
    "dmesg",
    "echo",
    "env",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "ifconfig",
    "kill",
    "ln",
    "ls",
    "sha256sum",
    "mkdir",
    "mknod",
    "mount",
    "mv",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "sed",
    "seq",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "touch",
    "tr",
    "tty",
    "true",
    "umount",
    "wc",
];

/// Runs a tool that must succeed.
pub fn tool(command: &mut Command) -> Vec<u8> {
    let output = command.output().expect("it can be run");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| {
        let assets = Assets::from_environment().expect("`cargo xtask` names the assets");
        let folder = tempfile::tempdir().expect("a directory can be made");
        let mut build = Command::new(place::cofferdam());
        build.args(["image", "build", "--init", "--kernel"]).arg(&assets.container_kernel);
        if let Some(modules) = &assets.container_modules {
            build.arg("--modules").arg(modules);
        }
        build.args(["--cmdline", &format!("{DEFAULT_COMMAND_LINE} quiet")]);
        tool(build.arg("-o").arg(folder.path().join("domain.igvm")));

        let [lowest, middle, highest] = ["lowest", "middle", "highest"].map(|name| folder.path().join(name));
        let bin = lowest.join("bin");
        fs::create_dir_all(&bin).expect("it can be made");
        fs::copy(&assets.busybox, bin.join("busybox")).expect("it can be copied");
        fs::copy(place::test_guest(), bin.join("test-guest")).expect("it can be copied");
        for name in APPLETS {
            symlink("busybox", bin.join(name)).expect("it can be made");
        }
        symlink("/run", lowest.join("var-run")).expect("it can be made");
        let text = |layer: &Path, name: &str, text: &str| {
            fs::create_dir_all(layer)
                .and_then(|()| fs::write(layer.join(name), text))
                .expect("it can be written");
        };
        let tmp = lowest.join("tmp");
        fs::create_dir(&tmp).expect("it can be made");
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).expect("it can be changed");
        text(&lowest, "which", "lowest\n");
        text(&middle, "which", "middle\n");
        text(&highest, "which", "highest\n");
        let bytes: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(highest.join("large"), bytes).expect("it can be written");
        let layers = [lowest, middle, highest].map(|content| layer(folder.path(), &content));
        Shared { layers: layers.into(), folder }
    })
}

/// The image of their domains.
pub fn image() -> PathBuf {
    shared().folder.path().join("domain.igvm")
}

/// The least memory that a domain needs for a shell: 64 MiB on the small kernel, 128 MiB on Debian's.
pub fn smallest_memory() -> &'static str {
    let assets = Assets::from_environment().expect("`cargo xtask` names the assets");
    if assets.container_modules.is_none() { "64M" } else { "128M" }
}

/// The layers that all containers of these tests have, each as a folder.
pub fn layers() -> [PathBuf; 3] {
    ["lowest", "middle", "highest"].map(|name| shared().folder.path().join(name))
}

/// Makes a layer of the folder `content`, in a folder of `place`.
pub fn layer(place: &Path, content: &Path) -> (Layer, PathBuf) {
    let name = content.file_name().expect("it has a name").to_string_lossy().into_owned();
    let (archive, output) = (place.join(format!("{name}.tar")), place.join(format!("{name}.layer")));
    let tar = ["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-c", "-C"];
    tool(Command::new("tar").args(tar).arg(content).arg("-f").arg(&archive).arg("."));
    let build = ["container", "build"];
    tool(
        Command::new(place::cofferdam())
            .args(build)
            .arg(&archive)
            .arg("-o")
            .arg(&output)
            .args(["--", "/bin/sh"]),
    );
    let bytes = fs::read(output.join("manifest.json")).expect("it was built");
    let layer = manifest::decode(&bytes).expect("it is valid").layers.remove(0);
    let file = output.join("layers").join(layer.root_hash.to_string()).join("layer.erofs");
    (layer, file)
}

/// A container to be, with three layers, which runs a shell script as user 0 and may do nothing else.
pub struct Container {
    folder: TempDir,
    /// What it is. The launch binds its digest, unless `bound` is something else.
    pub manifest: Manifest,
    /// Values for this start.
    pub env: BTreeMap<String, String>,
    /// What is bound instead.
    pub bound: Option<[u8; 32]>,
    /// Drives but for the manifest's: their names, files, and whether they can be written to.
    pub drives: Vec<(String, PathBuf, bool)>,
    /// What the manifest's drive has instead.
    pub manifest_drive: Option<Vec<u8>>,
    /// What the host sends to standard input.
    pub stdin: Vec<u8>,
    /// The platform that its domain is for.
    pub platform: &'static str,
    /// Memory of its domain.
    pub memory: &'static str,
}

impl Container {
    /// One that runs this script.
    pub fn new(script: &str) -> Self {
        let shared = shared();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let manifest = Manifest {
            host: Host {
                exec: vec![],
                signals: vec![],
                stderr: true,
                stdin: false,
                stdout: true,
                stop: None,
            },
            hostname: "under-test".to_owned(),
            layers: shared.layers.iter().map(|(layer, _)| layer.clone()).collect(),
            mounts: vec![],
            on_verity_failure: OnVerityFailure::Continue,
            process: Process {
                args: words(&["sh", "-c", script]),
                capabilities: vec![],
                cwd: "/".to_owned(),
                env: words(&["PATH=/nowhere:/bin"]),
                gid: 0,
                groups: vec![],
                no_new_privs: false,
                read_only_root: false,
                rlimits: vec![],
                start_env: vec![],
                terminal: false,
                uid: 0,
            },
            scratch: None,
            version: 1,
        };
        let drives = shared.layers.iter().enumerate();
        let drives = drives.map(|(at, (_, file))| (drive::layer(at), file.clone(), false)).collect();
        let folder = tempfile::tempdir().expect("a directory can be made");
        Self {
            folder,
            manifest,
            env: BTreeMap::new(),
            bound: None,
            drives,
            manifest_drive: None,
            stdin: vec![],
            platform: "plain",
            memory: "256M",
        }
    }

    /// Lets the host send a signal, and have the container stopped in an orderly way.
    pub fn stoppable(mut self, signals: &[Signal], signal: Signal, timeout_ms: u64) -> Self {
        self.manifest.host.signals = signals.to_owned();
        self.manifest.host.stop = Some(Stop { signal, timeout_ms });
        self
    }

    /// A file of this test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A drive's file, copied so that it can be changed.
    pub fn own_file(&mut self, id: &str) -> PathBuf {
        let copy = self.folder.path().join(id);
        let (_, file, _) =
            self.drives.iter_mut().find(|(name, _, _)| name == id).expect("there is such a drive");
        fs::copy(&*file, &copy).expect("it can be copied");
        *file = copy.clone();
        copy
    }

    /// Gives it an empty scratch drive, of the size in its manifest.
    pub fn with_scratch(mut self, scratch: manifest::Scratch) -> Self {
        let path = self.file("scratch");
        fs::File::create(&path).and_then(|file| file.set_len(scratch.size)).expect("it can be made");
        self.drives.push((drive::SCRATCH.to_owned(), path, true));
        self.manifest.scratch = Some(scratch);
        self
    }

    /// Runs it to its end.
    pub fn finish(self) -> Ended {
        self.start().finish()
    }

    /// Starts it.
    pub fn start(self) -> Started {
        let bytes = manifest::encode(&self.manifest).expect("the manifest is valid");
        let bound = self.bound.unwrap_or_else(|| manifest::digest(&bytes));
        let bytes = self.manifest_drive.clone();
        let bytes = bytes.unwrap_or_else(|| {
            let bytes = manifest::encode(&self.manifest).expect("the manifest is valid");
            drive::write(&bytes, &self.env).expect("it is not too long")
        });
        fs::write(self.file("manifest"), bytes).expect("it can be written");
        let socket = self.file("v");
        let mut run = Run::image(image())
            .with("host-data", crate::hex(&bound))
            .with("platform", self.platform)
            .with("memory", self.memory)
            .with("vsock", &socket);
        let drives = self.drives.iter().map(|(id, file, writable)| (&**id, file.clone(), *writable));
        for (id, file, writable) in drives.chain([(drive::MANIFEST, self.file("manifest"), false)]) {
            let mut words = OsString::from("path=");
            words.push(file);
            words.push(format!(",id={id}{}", if writable { "" } else { ",ro" }));
            run = run.with("drive", words);
        }
        let host = &self.manifest.host;
        let listen = |port: u32| Stream::listen(self.file(&format!("v_{port}")));
        let terminal = self.manifest.process.terminal;
        let stdin = (host.stdin || terminal).then(|| listen(1025));
        let stdout = (host.stdout && !terminal).then(|| listen(1026));
        let stderr = (host.stderr && !terminal).then(|| listen(1027));
        if let Some(stdin) = &stdin {
            // Without any, it stays open.
            stdin.send(self.stdin.clone(), !terminal && !self.stdin.is_empty());
        }
        Started { running: run.start(), streams: [stdin, stdout, stderr], socket, container: self }
    }
}

/// One of the host's ends.
struct Stream {
    path: PathBuf,
    input: std::sync::mpsc::Sender<(Vec<u8>, bool)>,
    output: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Stream {
    fn listen(path: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).expect("the socket can be made");
        let (input, bytes) = std::sync::mpsc::channel::<(Vec<u8>, bool)>();
        let output = Arc::<Mutex<Vec<u8>>>::default();
        let shared = output.clone();
        let thread = thread::spawn(move || {
            let (mut connection, _) = listener.accept().expect("somebody connects");
            let mut to = connection.try_clone().expect("there are descriptors");
            thread::spawn(move || {
                for (bytes, last) in bytes {
                    let _ = to.write_all(&bytes);
                    if last {
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    }
                }
            });
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length @ 1..) = connection.read(&mut buffer) {
                shared.lock().expect("no panic under the lock").extend(&buffer[..length]);
            }
            // The guest waits for that: now everything has arrived.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        });
        Self { path, input, output, thread }
    }

    fn send(&self, bytes: Vec<u8>, last: bool) {
        self.input.send((bytes, last)).expect("the thread is there");
    }

    /// What came.
    fn finish(self) -> Vec<u8> {
        // If nobody has connected, nobody will.
        drop(UnixStream::connect(&self.path));
        self.thread.join().expect("the thread ends");
        std::mem::take(&mut self.output.lock().expect("no panic under the lock"))
    }
}

/// A container that runs.
pub struct Started {
    /// Its domain.
    pub running: Running,
    /// The domain's vsock socket.
    pub socket: PathBuf,
    streams: [Option<Stream>; 3],
    container: Container,
}

impl Started {
    /// Sends bytes to standard input, or the terminal.
    pub fn send(&self, bytes: &[u8]) {
        self.streams[0].as_ref().expect("the host may").send(bytes.to_vec(), false);
    }

    /// Waits until standard output, or the terminal, has shown `text`.
    pub fn wait_for(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        let stream = self.streams[1].as_ref().or(self.streams[0].as_ref()).expect("the host sees one");
        let shown = || {
            let bytes = stream.output.lock().expect("no panic under the lock");
            bytes.windows(text.len()).any(|window| window == text.as_bytes())
        };
        while !shown() {
            assert!(Instant::now() < end, "no {text:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the end.
    pub fn finish(self) -> Ended {
        let done = self.running.finish();
        let [stdin, stdout, stderr] = self.streams.map(|stream| stream.map_or_else(Vec::new, Stream::finish));
        Ended { done, terminal: stdin, stdout, stderr, container: self.container }
    }
}

/// What is left of a container.
pub struct Ended {
    /// Its domain.
    pub done: Finished,
    /// What it wrote to its terminal.
    pub terminal: Vec<u8>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// And to standard error.
    pub stderr: Vec<u8>,
    /// What it was.
    pub container: Container,
}

impl Ended {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Whether its init said on the console why it goes no further.
    pub fn was_refused(&self, why: &str) -> bool {
        self.done.console().contains(&format!("cofferdam-init: {why}"))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [terminal, stdout, stderr] =
            [&self.terminal, &self.stdout, &self.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        write!(f, "{}\ncontainer's stdout:\n{stdout}\nstderr:\n{stderr}\nterminal:\n{terminal}", self.done)
    }
}
