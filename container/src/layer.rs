//! A layer as it is being read: names are put in their places, and what must not be is refused.
//!
//! Names are taken as paths below the root, whatever they begin with; one with `..` in it is refused. Symbolic links are
//! never followed: a name below one is refused too. A folder that is only implied by what is in it gets the attributes
//! that it has in the layers below.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::budget::{Budget, Exceeded};
use crate::erofs::is_known_xattr;
use crate::tree::{Attributes, Folder, Kind, Leaf, MAX_DEPTH, Node};

/// Longest part of a name, in bytes: NAME_MAX of Linux.
const MAX_PART: usize = 255;
/// Longest target of a symbolic link, in bytes.
const MAX_TARGET: usize = 4095;
/// Beginning of the names of whiteouts in images.
const WHITEOUT: &[u8] = b".wh.";
/// Beginning of what AUFS kept for itself.
const AUFS: &[u8] = b".wh..wh.";
/// The mark of an opaque folder.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Warnings of which a source shows so many; the others are counted.
const MAX_WARNINGS: usize = 20;

/// Why a name of a source is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameProblem {
    /// It leads out of the tree.
    #[error("it leaves the tree")]
    Escapes,
    /// A part of it is longer than a file system takes.
    #[error("a part of it is longer than {MAX_PART} bytes")]
    Long,
    /// Too many folders.
    #[error("it lies in more than {MAX_DEPTH} folders")]
    Deep,
    /// Zero bytes end names.
    #[error("it has a zero byte")]
    ZeroByte,
    /// What it lies in is no folder.
    #[error("{0:?} is not a folder, and links are not followed")]
    ParentNotFolder(String),
    /// The root can only be a folder.
    #[error("the root is a folder")]
    Root,
    /// The hard link's target leads out of the tree.
    #[error("its target {0:?} leaves the tree")]
    LinkEscapes(String),
    /// The hard link's target is not there.
    #[error("its target {0:?} is not in the same layer before it")]
    LinkMissing(String),
    /// Folders cannot have several names.
    #[error("its target {0:?} is a folder")]
    LinkToFolder(String),
    /// A symbolic link to nothing, or to a too long name.
    #[error("it is a symbolic link with a target of {0} bytes")]
    Target(usize),
    /// A whiteout of no name.
    #[error("it is a whiteout of no name")]
    Whiteout,
    /// An owner that Linux cannot have.
    #[error("its owner {0} is more than 32 bits")]
    Owner(u64),
    /// The map of a sparse file is wrong.
    #[error("its map of holes contradicts its size")]
    SparseMap,
    /// It was there before.
    #[error("it is there twice")]
    Twice,
    /// A kind of entry that is not known.
    #[error("it is of the unknown kind {0:?}")]
    Kind(char),
}

/// Why a layer is refused.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// For something in it.
    #[error("{name:?}: {problem}")]
    Name {
        /// The name, as the source has it.
        name: String,
        /// What is wrong.
        problem: NameProblem,
    },
    /// It costs too much.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
}

/// What was left out, for people.
#[derive(Debug, Default)]
pub struct Warnings {
    /// The first of them.
    pub shown: Vec<String>,
    /// How many there are beyond those.
    pub more: usize,
}

impl Warnings {
    fn add(&mut self, name: &[u8], text: &str) {
        if self.shown.len() < MAX_WARNINGS {
            self.shown.push(format!("{:?}: {text}", String::from_utf8_lossy(name)));
        } else {
            self.more += 1;
        }
    }
}

/// A layer that is being read.
#[derive(Debug)]
pub struct Reading<'a> {
    root: Folder,
    /// What the layers below make together.
    base: &'a Folder,
    /// Whether names with `.wh.` are whiteouts.
    whiteouts: bool,
    /// What pays for it.
    pub budget: &'a Budget,
    warnings: &'a mut Warnings,
}

impl<'a> Reading<'a> {
    /// An empty layer above `base`. `whiteouts` says whether names that begin with `.wh.` are whiteouts.
    pub fn new(base: &'a Folder, whiteouts: bool, budget: &'a Budget, warnings: &'a mut Warnings) -> Self {
        let mut attributes = base.attributes.clone();
        if attributes == Attributes::default() {
            attributes.mode = 0o755;
        }
        let root = Folder { attributes, ..Folder::default() };
        Self { root, base, whiteouts, budget, warnings }
    }

    /// The layer.
    pub fn finish(self) -> Folder {
        self.root
    }

    /// Notes that a name was left out.
    pub fn left_out(&mut self, name: &[u8], what: &str) {
        self.warnings.add(name, &format!("{what}: left out"));
    }

    /// Attributes without the extended ones that an image cannot have or must not say: those are left out.
    pub fn without_foreign_xattrs(&mut self, name: &[u8], mut attributes: Attributes) -> Attributes {
        let all = std::mem::take(&mut attributes.xattrs);
        attributes.xattrs = BTreeMap::new();
        for (xattr, value) in all {
            // Those of overlayfs would redirect names of other layers.
            let overlay = xattr.starts_with(b"trusted.overlay.") || xattr.starts_with(b"user.overlay.");
            if overlay || !is_known_xattr(&xattr) {
                let text = format!("extended attribute {:?}: left out", String::from_utf8_lossy(&xattr));
                self.warnings.add(name, &text);
            } else {
                attributes.xattrs.insert(xattr, value);
            }
        }
        attributes
    }

    /// Adds a folder, or gives one its attributes.
    ///
    /// # Errors
    /// If the name is refused, or too much.
    pub fn add_folder(&mut self, name: &[u8], attributes: Attributes) -> Result<(), LayerError> {
        self.spend(name, &attributes, 0)?;
        let parts = parts(name).map_err(|problem| refuse(name, problem))?;
        let Some((last, parents)) = parts.split_last() else {
            self.root.attributes = attributes;
            return Ok(());
        };
        let parent = self.parent(name, parents)?;
        match parent.children.get_mut(*last) {
            Some(Node::Folder(folder)) => folder.attributes = attributes,
            other => {
                // After a whiteout of the same name nothing of the layers below is left in it.
                let opaque = matches!(other, Some(Node::Whiteout));
                let folder = Folder { attributes, opaque, children: BTreeMap::new() };
                parent.children.insert(last.to_vec(), Node::Folder(folder));
            }
        }
        Ok(())
    }

    /// Adds what is no folder; for an image's layer it may be a whiteout.
    ///
    /// # Errors
    /// If the name is refused, or too much.
    pub fn add_leaf(&mut self, name: &[u8], attributes: Attributes, kind: Kind) -> Result<(), LayerError> {
        let target = if let Kind::Symlink(target) = &kind { target.len() } else { 0 };
        self.spend(name, &attributes, target)?;
        let fail = |problem| refuse(name, problem);
        let parts = parts(name).map_err(fail)?;
        let (last, parents) = parts.split_last().ok_or_else(|| fail(NameProblem::Root))?;
        if self.whiteouts && last.starts_with(WHITEOUT) {
            return self.add_whiteout(name, last, parents);
        }
        if let Kind::Symlink(target) = &kind
            && (target.is_empty() || target.len() > MAX_TARGET || target.contains(&0))
        {
            return Err(fail(NameProblem::Target(target.len())));
        }
        let parent = self.parent(name, parents)?;
        parent.children.insert(last.to_vec(), Node::Leaf(Rc::new(Leaf { attributes, kind })));
        Ok(())
    }

    /// Adds a further name of what has one in this layer.
    ///
    /// # Errors
    /// If a name is refused, or too much.
    pub fn add_hard_link(&mut self, name: &[u8], target: &[u8]) -> Result<(), LayerError> {
        self.spend(name, &Attributes::default(), 0)?;
        let fail = |problem| refuse(name, problem);
        let text = || String::from_utf8_lossy(target).into_owned();
        let to = parts(target).map_err(|_| fail(NameProblem::LinkEscapes(text())))?;
        let leaf = match self.root.find(to) {
            Some(Node::Leaf(leaf)) => leaf.clone(),
            Some(Node::Folder(_)) => return Err(fail(NameProblem::LinkToFolder(text()))),
            Some(Node::Whiteout) | None => return Err(fail(NameProblem::LinkMissing(text()))),
        };
        let parts = parts(name).map_err(fail)?;
        let (last, parents) = parts.split_last().ok_or_else(|| fail(NameProblem::Root))?;
        self.parent(name, parents)?.children.insert(last.to_vec(), Node::Leaf(leaf));
        Ok(())
    }

    fn add_whiteout(&mut self, name: &[u8], last: &[u8], parents: &[&[u8]]) -> Result<(), LayerError> {
        if last == OPAQUE {
            self.parent(name, parents)?.opaque = true;
            return Ok(());
        }
        if last.starts_with(AUFS) {
            return Ok(());
        }
        let hidden = last.strip_prefix(WHITEOUT).unwrap_or(last);
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refuse(name, NameProblem::Whiteout));
        }
        let parent = self.parent(name, parents)?;
        match parent.children.get_mut(hidden) {
            // A whiteout is about the layers below, whatever the order in the archive.
            Some(Node::Folder(folder)) => folder.opaque = true,
            Some(Node::Leaf(_) | Node::Whiteout) => {}
            None => {
                parent.children.insert(hidden.to_vec(), Node::Whiteout);
            }
        }
        Ok(())
    }

    fn spend(&mut self, name: &[u8], attributes: &Attributes, target: usize) -> Result<(), LayerError> {
        let xattrs: usize = attributes.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        Ok(self.budget.spend_name(name.len() + target + xattrs)?)
    }

    /// The folder in which a name lies.
    fn parent(&mut self, name: &[u8], parents: &[&[u8]]) -> Result<&mut Folder, LayerError> {
        let not_folder = |depth: usize| {
            let path = parents.iter().take(depth + 1).map(|part| String::from_utf8_lossy(part));
            refuse(name, NameProblem::ParentNotFolder(path.collect::<Vec<_>>().join("/")))
        };
        let mut folder = &mut self.root;
        let mut below = Some(self.base);
        for (depth, part) in parents.iter().enumerate() {
            let node_below = below.and_then(|below| below.children.get(*part));
            below = match node_below {
                Some(Node::Folder(folder)) => Some(folder),
                _ => None,
            };
            let is_new = match folder.children.get(*part) {
                Some(Node::Folder(_)) => false,
                Some(Node::Leaf(_)) => return Err(not_folder(depth)),
                Some(Node::Whiteout) => true,
                None if matches!(node_below, Some(Node::Leaf(_))) => return Err(not_folder(depth)),
                None => true,
            };
            if is_new {
                self.budget.spend_name(part.len())?;
                let hidden = folder.children.contains_key(*part);
                let usual = Attributes { mode: 0o755, ..Attributes::default() };
                let attributes = below.filter(|_| !hidden).map_or(usual, |below| below.attributes.clone());
                let implied = Folder { attributes, opaque: hidden, children: BTreeMap::new() };
                folder.children.insert(part.to_vec(), Node::Folder(implied));
            }
            folder = match folder.children.get_mut(*part) {
                Some(Node::Folder(next)) => next,
                _ => return Err(not_folder(depth)),
            };
        }
        Ok(folder)
    }
}

/// What refuses a name.
pub fn refuse(name: &[u8], problem: NameProblem) -> LayerError {
    LayerError::Name { name: String::from_utf8_lossy(name).into_owned(), problem }
}

/// The parts of a name, from the root on.
///
/// # Errors
/// If it leaves the tree, or is longer or deeper than a name may be.
pub fn parts(name: &[u8]) -> Result<Vec<&[u8]>, NameProblem> {
    let parts: Vec<&[u8]> =
        name.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&b"..".as_slice()) {
        return Err(NameProblem::Escapes);
    }
    if name.contains(&0) {
        return Err(NameProblem::ZeroByte);
    }
    if parts.iter().any(|part| part.len() > MAX_PART) {
        return Err(NameProblem::Long);
    }
    if parts.len() > MAX_DEPTH { Err(NameProblem::Deep) } else { Ok(parts) }
}
