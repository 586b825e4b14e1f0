//! What a kernel module says of itself: the section `.modinfo` of its ELF file, NUL-terminated strings `KEY=VALUE`.

/// Offsets in the header of a 64-bit ELF file (System V ABI, 4).
const SECTION_TABLE: usize = 0x28;
const SECTION_SIZE: usize = 0x3a;
const SECTION_COUNT: usize = 0x3c;
const SECTION_NAMES: usize = 0x3e;

/// What a module says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ModInfo {
    /// What must be loaded before it.
    pub depends: Vec<String>,
    /// Other names of it, such as `crypto-sha256`.
    pub aliases: Vec<String>,
    /// What should be loaded before it, if it is there: names or aliases.
    pub before: Vec<String>,
    /// What should be loaded after it, if it is there.
    pub after: Vec<String>,
    /// The kernel that it is for.
    pub kernel: String,
}

/// Not a kernel module.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is no kernel module: no 64-bit ELF file with a section .modinfo")]
pub struct NotAModule;

impl ModInfo {
    /// Reads it of the file of a module.
    pub fn read(module: &[u8]) -> Result<Self, NotAModule> {
        let section = section(module, b".modinfo").ok_or(NotAModule)?;
        let mut info = Self::default();
        for entry in section.split(|byte| *byte == 0) {
            let entry = String::from_utf8_lossy(entry);
            if let Some((key, value)) = entry.split_once('=') {
                info.add(key, value);
            }
        }
        Ok(info)
    }

    fn add(&mut self, key: &str, value: &str) {
        match key {
            "alias" => self.aliases.push(value.to_owned()),
            "depends" => {
                self.depends.extend(value.split(',').filter(|name| !name.is_empty()).map(str::to_owned))
            }
            "softdep" => {
                // `pre: a b post: c`
                let mut list: Option<&mut Vec<String>> = None;
                for word in value.split_ascii_whitespace() {
                    match (word, &mut list) {
                        ("pre:", _) => list = Some(&mut self.before),
                        ("post:", _) => list = Some(&mut self.after),
                        (name, Some(list)) => list.push(name.to_owned()),
                        (_, None) => {}
                    }
                }
            }
            "vermagic" => self.kernel = value.split(' ').next().unwrap_or_default().to_owned(),
            _ => {}
        }
    }
}

/// The content of the section `name`.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(number::<8>(elf, SECTION_TABLE)?).ok()?;
    let [size, count, names] =
        [SECTION_SIZE, SECTION_COUNT, SECTION_NAMES].map(|field| number::<2>(elf, field));
    let (size, count) = (usize::try_from(size?).ok()?, usize::try_from(count?).ok()?);
    let header = |index: usize| {
        let start = table.checked_add(index.checked_mul(size)?)?;
        elf.get(start..start.checked_add(size)?)
    };
    let content = |header: &[u8]| {
        let (offset, length) = (number::<8>(header, 0x18)?, number::<8>(header, 0x20)?);
        let offset = usize::try_from(offset).ok()?;
        elf.get(offset..offset.checked_add(usize::try_from(length).ok()?)?)
    };
    let names = content(header(usize::try_from(names?).ok()?)?)?;
    (0..count).filter_map(header).find_map(|header| {
        let at = usize::try_from(number::<4>(header, 0)?).ok()?;
        let rest = names.get(at..)?.strip_prefix(name)?;
        (rest.first() == Some(&0)).then(|| content(header))?
    })
}

/// The little-endian number of `SIZE` bytes at `offset`.
fn number<const SIZE: usize>(bytes: &[u8], offset: usize) -> Option<u64> {
    let field: &[u8; SIZE] = bytes.get(offset..)?.first_chunk()?;
    Some(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The file of a module that says `entries`.
    pub fn module(entries: &[&str]) -> Vec<u8> {
        let text: Vec<u8> = entries.iter().flat_map(|entry| [entry.as_bytes(), &[0]].concat()).collect();
        let names = b"\0.names\0.modinfo.not\0.modinfo\0";
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(0x40, 0);
        let names_at = file.len();
        file.extend_from_slice(names);
        let text_at = file.len();
        file.extend_from_slice(&text);
        let table = file.len();
        for (name, offset, size) in
            [(0, 0, 0), (1, names_at, names.len()), (8, 0, 64), (21, text_at, text.len())]
        {
            let mut header = [0; 64];
            header[0] = name;
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[SECTION_TABLE..][..8].copy_from_slice(&(table as u64).to_le_bytes());
        for (field, value) in [(SECTION_SIZE, 64), (SECTION_COUNT, 4), (SECTION_NAMES, 1)] {
            file[field] = value;
        }
        file
    }

    #[test]
    fn what_modules_say() {
        let info = ModInfo::read(&module(&[
            "license=GPL",
            "alias=crypto-xts",
            "alias=xts",
            "softdep=pre: ecb crypto-x post: late",
            "softdep=lost",
            "depends=a,b",
            "vermagic=6.12.1+deb SMP mod_unload",
        ]))
        .unwrap();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(info.aliases, words(&["crypto-xts", "xts"]));
        assert_eq!((info.before, info.after), (words(&["ecb", "crypto-x"]), words(&["late"])));
        assert_eq!((info.depends, info.kernel), (words(&["a", "b"]), "6.12.1+deb".to_owned()));
        assert_eq!(ModInfo::read(&module(&["depends="])).unwrap().depends, words(&[]));
    }

    #[test]
    fn what_is_no_module() {
        let good = module(&["depends=a"]);
        for length in 0..good.len() {
            assert_eq!(ModInfo::read(&good[..length]), Err(NotAModule), "{length}");
        }
        for field in [SECTION_TABLE, SECTION_SIZE, SECTION_COUNT, SECTION_NAMES] {
            let mut bad = good.clone();
            bad[field..field + 2].fill(0xff);
            // A table of more sections than there are is read as far as it goes.
            assert_eq!(ModInfo::read(&bad).is_ok(), field == SECTION_COUNT, "{field:#x}");
        }
        assert_eq!(ModInfo::read(b"#!/bin/sh"), Err(NotAModule));
    }
}
