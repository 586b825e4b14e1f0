//! Man pages and shell completions of the three programs, made of the definitions of their arguments. A program of
//! its own makes them (`make manuals`), so that the shipped ones carry nothing of it.

use std::fs;
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::{Shell, generate_to};

/// The programs, by their arguments.
pub fn programs() -> [Command; 3] {
    [cofferdam_cli::command(), cofferdam_vmm::arguments::command(), cofferdam_jailer::command()]
        .map(|command| command.disable_help_subcommand(true))
}

/// Makes the folders `man`, `bash`, `zsh` and `fish` in `folder`, with what belongs into them.
pub fn make(folder: &Path) -> io::Result<()> {
    let pages = folder.join("man");
    fs::create_dir_all(&pages)?;
    for mut program in programs() {
        let name = program.get_name().to_owned();
        clap_mangen::generate_to(program.clone(), &pages)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let completions = folder.join(shell.to_string());
            fs::create_dir_all(&completions)?;
            generate_to(shell, &mut program, &name, completions)?;
        }
        // bash-completion looks for a file named as the program.
        fs::rename(folder.join(format!("bash/{name}.bash")), folder.join(format!("bash/{name}")))?;
    }
    Ok(())
}
