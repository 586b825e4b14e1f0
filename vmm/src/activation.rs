//! The API socket from a service manager that listens for it, as systemd does: sd_listen_fds(3).
//!
//! `LISTEN_PID` says which process the sockets are for, `LISTEN_FDS` how many there are, from descriptor 3 on, and
//! `LISTEN_FDNAMES`, if it is there, what each is called. One socket is the API's; of several it is the one called `api`, and
//! the configuration may name the others as `fd:N`.

use std::os::fd::RawFd;

use thiserror::Error;

/// The first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// Name of the API's socket among others.
const NAME: &str = "api";

/// Why there is no telling which socket is the API's.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ActivationError {
    /// A variable has no number.
    #[error("{name}: {value:?} is no number")]
    NoNumber {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// Several sockets, and not one is the API's.
    #[error("LISTEN_FDNAMES: one of {sockets} sockets has to be called \"{NAME}\", {found} are")]
    NotOne {
        /// Sockets that are passed.
        sockets: RawFd,
        /// Those of that name.
        found: usize,
    },
}

/// The descriptor that is passed to process `pid` as the API's socket, if there is one.
pub fn api_socket(
    variable: impl Fn(&str) -> Option<String>,
    pid: u32,
) -> Result<Option<RawFd>, ActivationError> {
    let number = |name| match variable(name) {
        None => Ok(None),
        Some(value) => match value.parse::<RawFd>() {
            Ok(number) if number >= 0 => Ok(Some(number)),
            _ => Err(ActivationError::NoNumber { name, value }),
        },
    };
    // What is left over in the environment of a parent is not for this process.
    if number("LISTEN_PID")?.and_then(|listener| u32::try_from(listener).ok()) != Some(pid) {
        return Ok(None);
    }
    match number("LISTEN_FDS")? {
        None | Some(0) => Ok(None),
        Some(1) => Ok(Some(FIRST)),
        Some(sockets) => {
            let names = variable("LISTEN_FDNAMES").unwrap_or_default();
            let named: Vec<RawFd> = (0..sockets)
                .zip(names.split(':'))
                .filter(|(_, name)| *name == NAME)
                .map(|(index, _)| index)
                .collect();
            match named[..] {
                [index] => Ok(Some(FIRST.saturating_add(index))),
                _ => Err(ActivationError::NotOne { sockets, found: named.len() }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(variables: &[(&str, &str)]) -> Result<Option<RawFd>, ActivationError> {
        let variable = |name: &str| {
            variables.iter().find(|(given, _)| *given == name).map(|(_, value)| (*value).to_owned())
        };
        api_socket(variable, 77)
    }

    #[test]
    fn one_socket_is_the_api_s_and_of_several_the_one_of_that_name() {
        let (pid, one, three) = (("LISTEN_PID", "77"), ("LISTEN_FDS", "1"), ("LISTEN_FDS", "3"));
        assert_eq!(passed(&[pid, one]), Ok(Some(3)));
        assert_eq!(passed(&[pid, one, ("LISTEN_FDNAMES", "cofferdam.socket")]), Ok(Some(3)));
        assert_eq!(passed(&[pid, three, ("LISTEN_FDNAMES", "vsock:log:api")]), Ok(Some(5)));
        for (names, found) in [("", 0), ("a:b:c", 0), ("a:b:c:api", 0), ("api:b:api", 2)] {
            let error = Err(ActivationError::NotOne { sockets: 3, found });
            assert_eq!(passed(&[pid, three, ("LISTEN_FDNAMES", names)]), error, "{names}");
        }
        assert_eq!(passed(&[pid, three]), Err(ActivationError::NotOne { sockets: 3, found: 0 }));
    }

    #[test]
    fn what_is_for_another_process_or_nothing_is_none() {
        let one = ("LISTEN_FDS", "1");
        for variables in [&[][..], &[one], &[("LISTEN_PID", "78"), one], &[("LISTEN_PID", "77")]] {
            assert_eq!(passed(variables), Ok(None), "{variables:?}");
        }
        assert_eq!(passed(&[("LISTEN_PID", "77"), ("LISTEN_FDS", "0")]), Ok(None));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for value in ["", "x", "-1", "1 ", "99999999999"] {
            for (pid, count) in [(value, "1"), ("77", value)] {
                let error = passed(&[("LISTEN_PID", pid), ("LISTEN_FDS", count)]).unwrap_err();
                assert!(matches!(error, ActivationError::NoNumber { .. }), "{error}");
            }
        }
    }
}
