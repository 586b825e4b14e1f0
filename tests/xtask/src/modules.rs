//! The module tree of a kernel package: finds modules by name, with what they
//! depend on, and decompresses them.
//!
//! Dependencies are read from the modules themselves (`depends=` in their
//! `.modinfo` section), because a kernel package that was only unpacked has no
//! `modules.dep`: `depmod` writes that at installation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, tool};

/// A directory like `/lib/modules/VERSION`.
#[derive(Debug)]
pub struct ModuleTree {
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

/// A module, decompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF object.
    pub content: Vec<u8>,
}

impl ModuleTree {
    /// Reads the directory `root`, which has the modules below `kernel/` and
    /// the list `modules.builtin`.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        collect(&root.join("kernel"), &mut files)?;
        let list = root.join("modules.builtin");
        let built_in = fs::read_to_string(&list).map_err(Error::file("read", &list))?;
        let built_in = built_in.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { root: root.to_owned(), files, built_in })
    }

    /// The modules `names` and all that they depend on, each once, in an order
    /// in which they can be loaded. What is built into the kernel is left out;
    /// what is neither there nor built in is an error.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<Module>, Error> {
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        for name in names {
            self.add(name, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<(), Error> {
        let name = name.replace('-', "_");
        if self.built_in.contains(&name) || !seen.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            return Err(Error::NoModule { tree: self.root.clone(), name });
        };
        let content = decompress(path)?;
        for dependency in depends(&content) {
            self.add(&dependency, seen, order)?;
        }
        order.push(Module { name, content });
        Ok(())
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(Error::file("read", directory))? {
        let entry = entry.map_err(Error::file("read", directory))?;
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The name of the module in the file `path`, `NAME.ko` or `NAME.ko.COMPRESSION`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, extension) = file.split_once(".ko")?;
    (extension.is_empty() || extension.starts_with('.')).then(|| name.replace('-', "_"))
}

fn decompress(path: &Path) -> Result<Vec<u8>, Error> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => tool::filter_file("xz", &["-dc"], path),
        Some("zst") => tool::filter_file("zstd", &["-dcq"], path),
        Some("gz") => tool::filter_file("gzip", &["-dc"], path),
        _ => fs::read(path).map_err(Error::file("read", path)),
    }
}

/// The names after `depends=` in a module's `.modinfo` section, a list of
/// NUL-terminated `KEY=VALUE` strings.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default().split(|byte| *byte == 0).next();
    let value = String::from_utf8_lossy(value.unwrap_or_default());
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], built_in: &str) -> (tempfile::TempDir, ModuleTree) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("kernel/drivers/deep")).unwrap();
        for (file, depends) in modules {
            let content = format!("\x7fELF license=GPL\0depends={depends}\0name=x\0");
            fs::write(directory.path().join("kernel/drivers/deep").join(file), content).unwrap();
        }
        fs::write(directory.path().join("modules.builtin"), built_in).unwrap();
        let tree = ModuleTree::open(directory.path()).unwrap();
        (directory, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_directory, tree) =
            tree(&[("a.ko", "b-x,c"), ("b-x.ko", "d"), ("c.ko", "d"), ("d.ko", ""), ("e.ko", "")], "");
        assert_eq!(names(&tree.resolve(&["a", "d", "b_x"]).unwrap()), ["d", "b_x", "c", "a"]);
    }

    #[test]
    fn built_in_modules_are_left_out_and_unknown_ones_refused() {
        let (_directory, tree) = tree(&[("a.ko", "virtio")], "kernel/drivers/virtio/virtio.ko\n");
        assert_eq!(names(&tree.resolve(&["a", "virtio"]).unwrap()), ["a"]);
        let error = tree.resolve(&["a", "nothing"]).unwrap_err().to_string();
        assert!(error.contains("nothing"), "{error}");
    }

    #[test]
    fn circles_end() {
        let (_directory, tree) = tree(&[("a.ko", "b"), ("b.ko", "a")], "");
        assert_eq!(names(&tree.resolve(&["a"]).unwrap()), ["b", "a"]);
    }

    #[test]
    fn compressed_modules_are_decompressed() {
        let (directory, _) = tree(&[("a.ko", "b"), ("b.ko", "")], "");
        let path = directory.path().join("kernel/drivers/deep/b.ko");
        let plain = fs::read(&path).unwrap();
        tool::run(std::process::Command::new("xz").arg(&path)).unwrap();
        let tree = ModuleTree::open(directory.path()).unwrap();
        let resolved = tree.resolve(&["a"]).unwrap();
        assert_eq!(names(&resolved), ["b", "a"]);
        assert_eq!(resolved[0].content, plain);
    }

    #[test]
    fn names_of_files_and_odd_modinfo() {
        assert_eq!(module_name(Path::new("x/snd-hda.ko.xz")).as_deref(), Some("snd_hda"));
        assert_eq!(module_name(Path::new("modules.order")), None);
        assert_eq!(module_name(Path::new("a.koala")), None);
        assert_eq!(depends(b"depends=a"), [""; 0]);
        assert_eq!(depends(b"\0depends="), [""; 0]);
        assert_eq!(depends(b"\0depends=a,,b"), ["a", "b"]);
    }
}
