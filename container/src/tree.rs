//! A file system in memory, without the content of its files, as one layer or several make it.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::spool::Content;

/// Most folders on the way to a name.
pub const MAX_DEPTH: usize = 256;

/// What all kinds of nodes have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions: the twelve low bits of `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the content, in seconds since 1970.
    pub mtime: u64,
    /// Extended attributes, by their whole names.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub enum Node {
    /// A folder.
    Folder(Folder),
    /// Something else; names of the same are hard links.
    Leaf(Rc<Leaf>),
    /// Nothing, and what lower layers have of this name is hidden.
    Whiteout,
}

/// A folder.
#[derive(Clone, Debug, Default)]
pub struct Folder {
    /// Its attributes.
    pub attributes: Attributes,
    /// Whether what lower layers have in it is hidden.
    pub opaque: bool,
    /// What is in it.
    pub children: BTreeMap<Vec<u8>, Node>,
}

/// Something that is no folder.
#[derive(Debug)]
pub struct Leaf {
    /// Its attributes.
    pub attributes: Attributes,
    /// What it is.
    pub kind: Kind,
}

/// The kinds of leaves.
#[derive(Debug)]
pub enum Kind {
    /// A file.
    File(Content),
    /// A symbolic link, and its target.
    Symlink(Vec<u8>),
    /// A named pipe.
    Fifo,
}

impl Folder {
    /// What a path leads to, without following symbolic links.
    pub fn find<'a>(&self, path: impl IntoIterator<Item = &'a [u8]>) -> Option<&Node> {
        let mut parts = path.into_iter();
        let mut node = self.children.get(parts.next()?)?;
        for part in parts {
            let Node::Folder(folder) = node else { return None };
            node = folder.children.get(part)?;
        }
        Some(node)
    }

    /// Puts `upper` on top: afterwards this is to layers below it what both were.
    pub fn put_on_top(&mut self, upper: &Self) {
        self.attributes = upper.attributes.clone();
        if upper.opaque {
            self.children.clear();
            self.opaque = true;
        }
        for (name, node) in &upper.children {
            match (self.children.get_mut(name), node) {
                (Some(Node::Folder(below)), Node::Folder(above)) => below.put_on_top(above),
                // What is replaced hid what lower layers have of this name; so must the folder.
                (Some(_), Node::Folder(above)) => {
                    let folder = Self { opaque: true, ..above.clone() };
                    self.children.insert(name.clone(), Node::Folder(folder));
                }
                _ => {
                    self.children.insert(name.clone(), node.clone());
                }
            }
        }
    }

    /// Makes this the lowest layer, below which there is nothing to hide.
    pub fn forget_hidden(&mut self) {
        self.opaque = false;
        self.children.retain(|_, node| !matches!(node, Node::Whiteout));
        for node in self.children.values_mut() {
            if let Node::Folder(folder) = node {
                folder.forget_hidden();
            }
        }
    }
}
