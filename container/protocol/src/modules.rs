//! The list of kernel modules in the initial RAM disk of a container's domain, by which who makes the RAM disk tells init what
//! to load, and when.
//!
//! There is a line for each module, in an order in which they can be loaded: its file and, if not every domain needs it, the
//! words for those that do ([`Need`]), with blanks between.

/// What a domain may have for which it needs modules that others do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A scratch device that is encrypted, or has a file system at all.
    Scratch,
    /// AMD SEV-SNP, whose secure processor is asked for reports.
    Snp,
    /// Intel TDX, whose module is.
    Tdx,
}

impl Need {
    /// Its word in the list.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::Snp => "snp",
            Self::Tdx => "tdx",
        }
    }
}

/// The line, with its line feed, of a module that is needed for any of `needs`, or always if there are none.
pub fn line(file: &str, needs: &[Need]) -> String {
    let words: String = needs.iter().flat_map(|need| [" ", need.word()]).collect();
    format!("{file}{words}\n")
}

/// The file that a line of the list names, if it is needed for that; with none, if it is always needed.
pub fn file(line: &str, need: Option<Need>) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    let file = words.next()?;
    let needed = match need {
        None => words.next().is_none(),
        Some(need) => words.any(|word| word == need.word()),
    };
    needed.then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_for_all_or_for_those_of_its_words() {
        let some = line("a.ko", &[Need::Scratch, Need::Snp]);
        assert_eq!(some, "a.ko scratch snp\n");
        let files =
            [None, Some(Need::Scratch), Some(Need::Snp), Some(Need::Tdx)].map(|need| file(&some, need));
        assert_eq!(files, [None, Some("a.ko"), Some("a.ko"), None]);
        let all = line("b.ko", &[]);
        assert_eq!((file(&all, None), file(&all, Some(Need::Snp))), (Some("b.ko"), None));
        assert_eq!((file("c.ko later", None), file("", None)), (None, None));
    }
}
