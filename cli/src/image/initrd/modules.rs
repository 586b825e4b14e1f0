//! The modules of a kernel: those that are needed, and what they need, in the order in which they can be loaded.
//!
//! What a module needs is read from the module itself: `modules.dep` is written by `depmod` where a kernel is
//! installed, so a package that was only unpacked has none. It would not say everything either: the kernel asks for
//! algorithms of its crypto API by an alias (`crypto-sha256`) when they are used, and loads all modules that have it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use cofferdam_container::unpack::unpack;
use lzma_rust2::XzReader;

use super::modinfo::{ModInfo, NotAModule};

/// Largest module, bytes, when unpacked.
const MAX_MODULE: u64 = 64 << 20;
/// First bytes of a file that xz has packed.
const XZ: &[u8] = b"\xfd7zXZ\0";
/// Where modules with algorithms are, below `kernel/`.
const CRYPTO: [&str; 4] = ["crypto", "lib/crypto", "arch/x86/crypto", "drivers/crypto"];

/// Why the modules are not all there.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no module.
    #[error("{}: {source}", path.display())]
    NotAModule {
        /// Which.
        path: PathBuf,
        /// Why.
        source: NotAModule,
    },
    /// It is too large.
    #[error("{} has more than {} MiB when unpacked", .0.display(), MAX_MODULE >> 20)]
    Large(PathBuf),
    /// A module is neither there nor built in.
    #[error("the module {name} is neither in {} nor built into the kernel (needed by {by})", tree.display())]
    Missing {
        /// Its name.
        name: String,
        /// What needs it.
        by: String,
        /// Where it was looked for.
        tree: PathBuf,
    },
    /// No module has an algorithm.
    #[error("no module in {} has the algorithm {name}, and the kernel has it not built in", tree.display())]
    Algorithm {
        /// Its name.
        name: String,
        /// Where it was looked for.
        tree: PathBuf,
    },
    /// The modules are another kernel's.
    #[error("{} is for the kernel {found:?}, not for {expected:?}", path.display())]
    Kernel {
        /// The module.
        path: PathBuf,
        /// The kernel that it is for.
        found: String,
        /// The kernel that there is.
        expected: String,
    },
}

/// Something of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A module.
    Module(&'static str),
    /// A crypto algorithm by its name in the kernel, which has all modules that know it.
    Algorithm(&'static str),
}

/// A folder like /lib/modules/VERSION.
#[derive(Debug)]
pub struct ModuleTree {
    root: PathBuf,
    kernel: String,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    /// Names of modules and of what is built in, by their aliases: of algorithms, and of all that is built in.
    aliases: BTreeMap<String, BTreeSet<String>>,
}

/// A module, unpacked.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file.
    pub content: Vec<u8>,
}

impl ModuleTree {
    /// Reads the folder `root` with the modules of the kernel of the version `kernel`: the list `modules.builtin`, and unless
    /// everything is built in the folder `kernel`.
    pub fn open(root: &Path, kernel: &str) -> Result<Self, ModulesError> {
        let read = |path: PathBuf| fs::read_to_string(&path).map_err(failed(&path));
        let built_in = read(root.join("modules.builtin"))?;
        let mut tree = Self {
            root: root.to_owned(),
            kernel: kernel.to_owned(),
            files: BTreeMap::new(),
            built_in: built_in.lines().filter_map(|line| module_name(Path::new(line))).collect(),
            aliases: BTreeMap::new(),
        };
        let information = root.join("modules.builtin.modinfo");
        if information.exists() {
            tree.add_built_in_aliases(&read(information)?);
        }
        let modules = root.join("kernel");
        if modules.exists() {
            collect(&modules, &mut tree.files)?;
        }
        tree.add_aliases_of_algorithms()?;
        Ok(tree)
    }

    /// The modules that are `needed`, in this order, and all that they need, each once, and after what it needs. What is built
    /// in is left out.
    pub fn resolve<'a>(
        &self,
        needed: impl IntoIterator<Item = &'a Need>,
    ) -> Result<Vec<Module>, ModulesError> {
        let mut resolved = Resolved { tree: self, seen: BTreeSet::new(), modules: Vec::new() };
        for need in needed {
            match need {
                Need::Module(name) => resolved.add(name, "container domains")?,
                Need::Algorithm(name) => {
                    let alias = format!("crypto-{name}");
                    if !self.aliases.contains_key(&alias) {
                        let (name, tree) = ((*name).to_owned(), self.root.clone());
                        return Err(ModulesError::Algorithm { name, tree });
                    }
                    resolved.add_if_there(&alias)?;
                }
            }
        }
        Ok(resolved.modules)
    }

    /// Lines `MODULE.alias=ALIAS`, ended by NUL.
    fn add_built_in_aliases(&mut self, information: &str) {
        for line in information.split('\0') {
            if let Some((name, alias)) = line.split_once(".alias=") {
                self.aliases.entry(alias.to_owned()).or_default().insert(name.replace('-', "_"));
            }
        }
    }

    fn add_aliases_of_algorithms(&mut self) -> Result<(), ModulesError> {
        let folders = CRYPTO.map(|folder| self.root.join("kernel").join(folder));
        for (name, path) in &self.files {
            if folders.iter().any(|folder| path.starts_with(folder)) {
                for alias in self.information(path, &unpack_file(path)?)?.aliases {
                    self.aliases.entry(alias).or_default().insert(name.clone());
                }
            }
        }
        Ok(())
    }

    fn information(&self, path: &Path, content: &[u8]) -> Result<ModInfo, ModulesError> {
        let path = || path.to_owned();
        let information =
            ModInfo::read(content).map_err(|source| ModulesError::NotAModule { path: path(), source })?;
        if information.kernel != self.kernel {
            let (found, expected) = (information.kernel, self.kernel.clone());
            return Err(ModulesError::Kernel { path: path(), found, expected });
        }
        Ok(information)
    }
}

/// Modules in their order.
struct Resolved<'a> {
    tree: &'a ModuleTree,
    seen: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Resolved<'_> {
    /// Adds a module that is needed by `by`, after what it needs.
    fn add(&mut self, name: &str, by: &str) -> Result<(), ModulesError> {
        let name = name.replace('-', "_");
        if self.tree.built_in.contains(&name) || !self.seen.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.tree.files.get(&name) else {
            return Err(ModulesError::Missing { name, by: by.to_owned(), tree: self.tree.root.clone() });
        };
        let content = unpack_file(path)?;
        let information = self.tree.information(path, &content)?;
        for other in &information.before {
            self.add_if_there(other)?;
        }
        for other in &information.depends {
            self.add(other, &name)?;
        }
        self.modules.push(Module { name, content });
        for other in &information.after {
            self.add_if_there(other)?;
        }
        Ok(())
    }

    /// Adds the module `name`, or all that have it as an alias.
    fn add_if_there(&mut self, name: &str) -> Result<(), ModulesError> {
        if self.tree.files.contains_key(&name.replace('-', "_")) {
            return self.add(name, name);
        }
        for module in self.tree.aliases.get(name).into_iter().flatten() {
            if self.tree.files.contains_key(module) {
                self.add(module, name)?;
            }
        }
        Ok(())
    }
}

/// The name of the module in the file `path`, `NAME.ko` or `NAME.ko.COMPRESSION`.
fn module_name(path: &Path) -> Option<String> {
    let (name, extension) = path.file_name()?.to_str()?.split_once(".ko")?;
    (extension.is_empty() || extension.starts_with('.')).then(|| name.replace('-', "_"))
}

/// Finds the modules below `folder`, without following links.
fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModulesError> {
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let entry = entry.map_err(failed(folder))?;
        let path = entry.path();
        if entry.file_type().map_err(failed(&path))?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

fn unpack_file(path: &Path) -> Result<Vec<u8>, ModulesError> {
    let packed = fs::read(path).map_err(failed(path))?;
    let mut content = Vec::new();
    let unpacked: io::Result<Box<dyn Read + '_>> =
        if packed.starts_with(XZ) { Ok(Box::new(XzReader::new(&*packed, true))) } else { unpack(&*packed) };
    unpacked
        .and_then(|reader| reader.take(MAX_MODULE + 1).read_to_end(&mut content))
        .map_err(failed(path))?;
    if content.len() as u64 > MAX_MODULE { Err(ModulesError::Large(path.to_owned())) } else { Ok(content) }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ModulesError {
    let path = path.to_owned();
    move |source| ModulesError::Read { path, source }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::modinfo::tests::module;
    use super::*;

    const KERNEL: &str = "6.12.1";

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(built_in: &str) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(tree.path("kernel/crypto/deep")).unwrap();
            fs::create_dir_all(tree.path("kernel/drivers")).unwrap();
            fs::write(tree.path("modules.builtin"), built_in).unwrap();
            tree
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// Adds a module with these strings, and is itself again.
        fn with(self, file: &str, entries: &[&str]) -> Self {
            let entries = [entries, &["vermagic=6.12.1 SMP"]].concat();
            fs::write(self.path("kernel").join(file), module(&entries)).unwrap();
            self
        }

        fn resolve(
            &self,
            names: &[&'static str],
            algorithms: &[&'static str],
        ) -> Result<Vec<String>, String> {
            let algorithms = algorithms.iter().copied().map(Need::Algorithm);
            let needed: Vec<Need> = algorithms.chain(names.iter().copied().map(Need::Module)).collect();
            let modules = ModuleTree::open(self.0.path(), KERNEL)
                .and_then(|tree| tree.resolve(&needed))
                .map_err(|error| error.to_string().replace(&self.path("").display().to_string(), "TREE/"))?;
            Ok(modules.into_iter().map(|module| module.name).collect())
        }
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let tree = Tree::new("kernel/drivers/virtio/virtio.ko\n")
            .with("drivers/a.ko", &["depends=b-x,c,virtio"])
            .with("drivers/b-x.ko", &["depends=d"])
            .with("drivers/c.ko", &["depends=d"])
            .with("drivers/d.ko", &["depends="])
            .with("drivers/unused.ko", &["depends="]);
        assert_eq!(tree.resolve(&["a", "d", "b_x", "virtio"], &[]).unwrap(), ["d", "b_x", "c", "a"]);
    }

    #[test]
    fn soft_dependencies_are_added_if_they_are_there() {
        let tree = Tree::new("kernel/lib/built.ko\n")
            .with("drivers/a.ko", &["depends=d", "softdep=pre: first crypto-sum nowhere built post: last"])
            .with("drivers/d.ko", &[])
            .with("drivers/first.ko", &[])
            .with("drivers/last.ko", &[])
            .with("crypto/sum-generic.ko", &["alias=crypto-sum"])
            .with("crypto/deep/sum-fast.ko", &["alias=crypto-sum", "depends=helper"])
            .with("crypto/helper.ko", &[]);
        let expected = ["first", "helper", "sum_fast", "sum_generic", "d", "a", "last"];
        assert_eq!(tree.resolve(&["a"], &[]).unwrap(), expected);
    }

    #[test]
    fn algorithms_are_found_by_their_aliases() {
        let tree = Tree::new("kernel/crypto/hmac.ko\nkernel/crypto/sha256_generic.ko\n")
            .with("crypto/sha256-fast.ko", &["alias=crypto-sha256"])
            .with("crypto/xts.ko", &["alias=crypto-xts", "softdep=pre: ecb"])
            .with("crypto/ecb.ko", &["alias=crypto-ecb"])
            // Not where the kernel has its algorithms.
            .with("drivers/odd.ko", &["alias=crypto-odd"]);
        let information = "hmac.alias=crypto-hmac\0sha256_generic.alias=crypto-sha256\0hmac.license=GPL\0";
        fs::write(tree.path("modules.builtin.modinfo"), information).unwrap();
        assert_eq!(tree.resolve(&[], &["hmac", "sha256", "xts"]).unwrap(), ["sha256_fast", "ecb", "xts"]);
        assert_eq!(
            tree.resolve(&[], &["odd"]).unwrap_err(),
            "no module in TREE has the algorithm odd, and the kernel has it not built in"
                .replace("TREE", tree.path("").to_str().unwrap().trim_end_matches('/'))
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let tree = Tree::new("").with("drivers/a.ko", &["depends=b"]);
        let place = tree.path("").display().to_string();
        let place = place.trim_end_matches('/');
        assert_eq!(
            tree.resolve(&["a"], &[]).unwrap_err(),
            format!("the module b is neither in {place} nor built into the kernel (needed by a)")
        );
        let error = tree.resolve(&["dm-crypt"], &[]).unwrap_err();
        assert!(
            error.starts_with("the module dm_crypt is neither")
                && error.ends_with("(needed by container domains)")
        );
        fs::remove_file(tree.path("modules.builtin")).unwrap();
        assert!(tree.resolve(&["a"], &[]).unwrap_err().starts_with("cannot read TREE/modules.builtin: "));
    }

    #[test]
    fn everything_may_be_built_in() {
        let tree = Tree::new("kernel/fs/a.ko\n");
        fs::remove_dir_all(tree.path("kernel")).unwrap();
        assert_eq!(tree.resolve(&["a"], &[]).unwrap(), [""; 0]);
    }

    #[test]
    fn modules_of_others_are_refused() {
        let tree = Tree::new("").with("drivers/a.ko", &["depends="]);
        fs::write(tree.path("kernel/drivers/b.ko"), "text").unwrap();
        assert_eq!(
            tree.resolve(&["b"], &[]).unwrap_err(),
            "TREE/kernel/drivers/b.ko: it is no kernel module: no 64-bit ELF file with a section .modinfo"
        );
        fs::write(tree.path("kernel/drivers/c.ko"), module(&["vermagic=6.1.0 SMP"])).unwrap();
        assert_eq!(
            tree.resolve(&["c"], &[]).unwrap_err(),
            r#"TREE/kernel/drivers/c.ko is for the kernel "6.1.0", not for "6.12.1""#
        );
    }

    #[test]
    fn circles_end() {
        let tree =
            Tree::new("").with("drivers/a.ko", &["depends=b"]).with("drivers/b.ko", &["softdep=pre: a"]);
        assert_eq!(tree.resolve(&["a"], &[]).unwrap(), ["b", "a"]);
    }

    #[test]
    fn packed_modules_are_unpacked() {
        for (program, extension) in [("xz", "xz"), ("zstd", "zst"), ("gzip", "gz")] {
            let tree = Tree::new("").with("drivers/a.ko", &["depends=b"]).with("drivers/b.ko", &[]);
            let path = tree.path("kernel/drivers/b.ko");
            let plain = fs::read(&path).unwrap();
            let output = tree.path(&format!("kernel/drivers/b.ko.{extension}"));
            let packed = Command::new(program).arg("-c").arg(&path).output().unwrap().stdout;
            fs::write(&output, &packed).unwrap();
            fs::remove_file(&path).unwrap();
            let modules =
                ModuleTree::open(tree.0.path(), KERNEL).unwrap().resolve(&[Need::Module("a")]).unwrap();
            assert_eq!(modules[0], Module { name: "b".to_owned(), content: plain }, "{program}");
            fs::write(&output, &packed[..packed.len() - 9]).unwrap();
            let error = tree.resolve(&["a"], &[]).unwrap_err();
            assert!(error.starts_with("cannot read TREE/kernel/drivers/b.ko."), "{error}");
        }
    }

    #[test]
    fn names_of_files() {
        assert_eq!(module_name(Path::new("x/snd-hda.ko.xz")).as_deref(), Some("snd_hda"));
        assert_eq!(module_name(Path::new("modules.order")), None);
        assert_eq!(module_name(Path::new("a.kotlin")), None);
    }
}
