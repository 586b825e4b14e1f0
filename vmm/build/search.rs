//! Rearranges a seccomp program so that a system call's number is looked for by halves.
//!
//! seccompiler's programs compare the number with one after the other. When a program is installed, the kernel runs it for
//! every number there is, to see which calls are allowed whatever their arguments (Linux `kernel/seccomp.c`,
//! `seccomp_cache_prepare`), and compiles it. With sixty rules that took a tenth of a start.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use seccompiler::{BpfProgram, sock_filter};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

// The instructions of which seccompiler's programs consist (Linux `include/uapi/linux/bpf_common.h`).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Where `seccomp_data` has the number and the architecture (Linux `include/uapi/linux/seccomp.h`).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// A program that answers as `plain` does, which is one of seccompiler's.
pub fn by_halves(plain: &[sock_filter]) -> Result<BpfProgram> {
    const HEAD: usize = 4;
    match plain {
        [architecture, check, kill, number, ..]
            if (architecture.code, architecture.k) == (LOAD, ARCHITECTURE)
                && (check.code, check.jt, check.jf) == (JUMP_IF_EQUAL, 1, 0)
                && kill.code == RETURN
                && (number.code, number.k) == (LOAD, NUMBER) => {}
        _ => return Err("the program does not begin with the check of the architecture".into()),
    }
    let (head, rest) = plain.split_at(HEAD);
    // From one of these numbers to the next all fare alike.
    let compared = rest.iter().filter(|instruction| instruction.code == JUMP_IF_EQUAL);
    let bounds = compared.flat_map(|compare| [Some(compare.k), compare.k.checked_add(1)]).flatten();
    let mut ranges = Vec::new();
    for first in BTreeSet::from_iter(bounds.chain([0])) {
        ranges.push((first, decided(plain, HEAD, first)?));
    }
    ranges.dedup_by_key(|(_, at)| *at);
    let mut rest = Backwards { plain, made: Vec::new(), places: BTreeMap::new() };
    rest.search(&ranges)?;
    Ok(head.iter().cloned().chain(rest.made.into_iter().rev()).collect())
}

/// The place to which `plain` comes from `at` with `number` loaded: an answer, or the load of an argument.
fn decided(plain: &[sock_filter], mut at: usize, number: u32) -> Result<usize> {
    loop {
        let instruction = plain.get(at).ok_or("a jump leaves the program")?;
        let skipped = match instruction.code {
            RETURN => return Ok(same_answer(plain, at)),
            LOAD if ![NUMBER, ARCHITECTURE].contains(&instruction.k) => return Ok(at),
            JUMP => instruction.k,
            JUMP_IF_EQUAL if instruction.k == number => instruction.jt.into(),
            JUMP_IF_EQUAL => instruction.jf.into(),
            code => return Err(format!("instruction {code:#x} on a number").into()),
        };
        at = target(at, skipped)?;
    }
}

/// The first instruction that answers as that at `at` does.
fn same_answer(plain: &[sock_filter], at: usize) -> usize {
    let answer = |instruction: &sock_filter| (instruction.code, instruction.k);
    plain.iter().position(|other| answer(other) == answer(&plain[at])).unwrap_or(at)
}

fn target(at: usize, skipped: u32) -> Result<usize> {
    Ok(at + 1 + usize::try_from(skipped)?)
}

/// A program that is made from its end: jumps go forward, so their targets are there before them. A place in it is a
/// distance from the end.
struct Backwards<'p> {
    plain: &'p [sock_filter],
    made: Vec<sock_filter>,
    /// Where instructions of `plain` are.
    places: BTreeMap<usize, usize>,
}

impl Backwards<'_> {
    /// Looks for the loaded number in `ranges`, each of which begins with one and goes on at its place in `plain`.
    fn search(&mut self, ranges: &[(u32, usize)]) -> Result<usize> {
        if let [(_, at)] = ranges {
            return self.go_on(*at);
        }
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let (pivot, _) = upper.first().ok_or("there is no number")?;
        let (higher, smaller) = (self.search(upper)?, self.search(lower)?);
        self.branch(JUMP_IF_GREATER_OR_EQUAL, *pivot, higher, smaller)
    }

    /// Goes on as `plain` does at `at`.
    fn go_on(&mut self, at: usize) -> Result<usize> {
        let instruction = self.plain.get(at).ok_or("a jump leaves the program")?.clone();
        let at = if instruction.code == RETURN { same_answer(self.plain, at) } else { at };
        if let Some(place) = self.places.get(&at) {
            return Ok(*place);
        }
        let place = match instruction.code {
            RETURN => self.push(instruction),
            JUMP => self.go_on(target(at, instruction.k)?)?,
            LOAD | AND => {
                let next = self.go_on(target(at, 0)?)?;
                if next + 1 != self.made.len() {
                    self.jump(next)?;
                }
                self.push(instruction)
            }
            code @ (JUMP_IF_EQUAL | JUMP_IF_GREATER | JUMP_IF_GREATER_OR_EQUAL) => {
                let no = self.go_on(target(at, instruction.jf.into())?)?;
                let yes = self.go_on(target(at, instruction.jt.into())?)?;
                self.branch(code, instruction.k, yes, no)?
            }
            code => return Err(format!("instruction {code:#x} on an argument").into()),
        };
        self.places.insert(at, place);
        Ok(place)
    }

    fn branch(&mut self, code: u16, k: u32, yes: usize, no: usize) -> Result<usize> {
        // Another jump may come between.
        let is_far = |made: &[sock_filter], place: usize| made.len() - place > usize::from(u8::MAX);
        let yes = if is_far(&self.made, yes) { self.jump(yes)? } else { yes };
        let no = if is_far(&self.made, no) { self.jump(no)? } else { no };
        let skipped = |place: usize| u8::try_from(self.made.len() - 1 - place);
        let (jt, jf) = (skipped(yes)?, skipped(no)?);
        Ok(self.push(sock_filter { code, jt, jf, k }))
    }

    fn jump(&mut self, place: usize) -> Result<usize> {
        let k = u32::try_from(self.made.len() - 1 - place)?;
        Ok(self.push(sock_filter { code: JUMP, jt: 0, jf: 0, k }))
    }

    fn push(&mut self, instruction: sock_filter) -> usize {
        self.made.push(instruction);
        self.made.len() - 1
    }
}
