//! How much stack a program needs at most, by the assembly that the compiler made of it: the deepest chain of calls, each
//! function with all that it ever takes. A loop of calls, or an instruction that is not known here, is an error.

use std::collections::{BTreeMap, BTreeSet};

/// What a function of the compiler's library (`memcpy` and the like) takes, bytes: its return address, and more registers
/// than any saves.
const LIBRARY: u64 = 64;
const LIBRARY_FUNCTIONS: [&str; 5] = ["memcpy", "memmove", "memset", "memcmp", "bcmp"];
/// Bytes of a return address, and of a register.
const WORD: u64 = 8;

/// A function.
#[derive(Debug, Default)]
struct Function {
    /// What it takes, bytes, its return address included.
    frame: u64,
    /// Functions that it calls or goes on to.
    calls: BTreeSet<String>,
    /// Whether it calls an address that it has in a register or in memory.
    calls_pointer: bool,
}

/// What `root` of the program in AT&T syntax takes at most, bytes.
pub fn depth(assembly: &str, root: &str) -> Result<u64, String> {
    let names: BTreeSet<&str> = assembly
        .lines()
        .filter_map(|line| line.trim().strip_prefix(".type")?.trim().strip_suffix(",@function"))
        .collect();
    let mut functions = BTreeMap::new();
    // Functions whose address is somewhere, so that a pointer may lead to them.
    let mut pointed: BTreeSet<&str> = BTreeSet::new();
    let mut current: Option<&str> = None;
    for line in assembly.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(label) = line.strip_suffix(':') {
            if names.contains(label) {
                current = Some(label);
            } else if label.starts_with(".Lfunc_end") {
                current = None;
            }
            continue;
        }
        let (instruction, operands) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        if !["callq", "jmp", ".type", ".size", ".globl", ".hidden"].contains(&instruction) {
            pointed.extend(symbols(operands).filter(|symbol| names.contains(symbol)));
        }
        if let Some(name) = current {
            let function =
                functions.entry(name).or_insert_with(|| Function { frame: WORD, ..Function::default() });
            function.add(instruction, operands.trim()).map_err(|why| format!("{name}: {line}: {why}"))?;
        }
    }
    Walk { functions: &functions, pointed: &pointed, open: Vec::new() }.depth(root)
}

/// The names in an instruction's or directive's operands.
fn symbols(operands: &str) -> impl Iterator<Item = &str> {
    operands
        .split(|c: char| !(c.is_alphanumeric() || "_.$".contains(c)))
        .map(|word| word.trim_start_matches('$'))
}

impl Function {
    fn add(&mut self, instruction: &str, operands: &str) -> Result<(), String> {
        match instruction {
            "callq" => match operands.strip_prefix('*') {
                None => drop(self.calls.insert(operands.to_owned())),
                Some(target) => match target.strip_suffix("@GOTPCREL(%rip)") {
                    Some(symbol) => drop(self.calls.insert(symbol.to_owned())),
                    None => self.calls_pointer = true,
                },
            },
            "jmp" if !operands.starts_with('.') => drop(self.calls.insert(operands.to_owned())),
            "jmpq" => self.calls_pointer = true,
            _ if instruction.starts_with("push") => self.frame += WORD,
            _ if instruction.starts_with("pop") => {}
            "subq" | "addq" if operands.ends_with(", %rsp") => {
                let amount = operands.strip_prefix('$').and_then(|text| text.split(',').next());
                let amount: i64 = amount
                    .and_then(|text| text.parse().ok())
                    .ok_or("the stack pointer moves by no constant")?;
                let down = if instruction == "subq" { amount } else { -amount };
                self.frame += u64::try_from(down).unwrap_or(0);
            }
            // Compared or stored it stays as it is.
            _ if operands.ends_with(", %rsp") || operands == "%rsp" => {
                return Err("the stack pointer changes in a way that is not known".to_owned());
            }
            _ => {}
        }
        Ok(())
    }
}

struct Walk<'a> {
    functions: &'a BTreeMap<&'a str, Function>,
    pointed: &'a BTreeSet<&'a str>,
    /// The functions on the way to the present one.
    open: Vec<&'a str>,
}

impl<'a> Walk<'a> {
    fn depth(&mut self, name: &str) -> Result<u64, String> {
        if LIBRARY_FUNCTIONS.contains(&name) {
            return Ok(LIBRARY);
        }
        let (&name, function) =
            self.functions.get_key_value(name).ok_or_else(|| format!("{name} is not in the program"))?;
        if self.open.contains(&name) {
            return Err(format!("{name} may call itself: {:?}", self.open));
        }
        self.open.push(name);
        let mut deepest = if function.calls_pointer { LIBRARY } else { 0 };
        let pointed =
            if function.calls_pointer { self.pointed.iter().copied().collect() } else { Vec::new() };
        for called in function.calls.iter().map(String::as_str).chain(pointed) {
            deepest = deepest.max(self.depth(called)?);
        }
        self.open.pop();
        Ok(function.frame + deepest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Functions with these names and bodies.
    fn program(functions: &[(&str, &str)]) -> String {
        let one = |(name, body): &(&str, &str)| {
            format!(
                "\t.type\t{name},@function\n{name}:\n{body}\n\tretq\n.Lfunc_end0:\n\t.size\t{name}, .Lfunc_end0-{name}\n"
            )
        };
        functions.iter().map(one).collect()
    }

    #[test]
    fn the_deepest_chain_counts() {
        let program = program(&[
            (
                "root",
                "\tpushq\t%rbx\n\tsubq\t$100, %rsp\n\tcallq\tshallow\n\tcallq\tdeep\n\taddq\t$100, %rsp\n\tpopq\t%rbx",
            ),
            ("shallow", "\tcallq\t*memcpy@GOTPCREL(%rip)"),
            ("deep", "\taddq\t$-128, %rsp\n\tmovq\t%rax, 8(%rsp)\n\tjmp\tlast\t# TAILCALL"),
            ("last", "\tjmp\t.LBB1\n.LBB1:\n\tpushq\t%rax"),
        ]);
        assert_eq!(depth(&program, "root"), Ok(8 + 8 + 100 + (8 + 128) + (8 + 8)));
        assert_eq!(depth(&program, "shallow"), Ok(8 + 64));
    }

    #[test]
    fn a_pointer_leads_to_every_function_whose_address_is_taken() {
        let mut text = program(&[
            ("root", "\tmovq\t24(%rsi), %rax\n\tcallq\t*%rax"),
            ("method", "\tsubq\t$200, %rsp"),
            ("loaded", "\tsubq\t$300, %rsp"),
            ("never", "\tsubq\t$4000, %rsp"),
        ]);
        text.push_str(".Lvtable:\n\t.quad\tmethod\n");
        assert_eq!(depth(&text, "root"), Ok(8 + 208));
        text.push_str(&program(&[("other", "\tmovq\t$loaded, %rcx")]));
        assert_eq!(depth(&text, "root"), Ok(8 + 308));
    }

    #[test]
    fn what_has_no_bound_is_an_error() {
        for (body, why) in [
            ("\tcallq\tother", "may call itself"),
            ("\tcallq\telsewhere", "not in the program"),
            ("\tsubq\t%rax, %rsp", "by no constant"),
            ("\tandq\t$-32, %rsp", "not known"),
            ("\tmovq\t%rbp, %rsp", "not known"),
        ] {
            let program = program(&[("root", body), ("other", "\tcallq\troot")]);
            let error = depth(&program, "root").unwrap_err();
            assert!(error.contains(why), "{body}: {error}");
        }
    }
}
