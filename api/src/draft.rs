//! A configuration that clients put together piece by piece. It is good at any time, but for the kernel that
//! it may still lack: a piece that would make it wrong is refused, and nothing changes.

use serde::Serialize;

use crate::actions::ActionError;
use crate::config::{
    BootSource, Confidential, Container, DomainConfig, Drive, MachineConfig, Serial, Vsock,
    default_stop_timeout_ms, root_first,
};
use crate::requests::{DrivePatch, MachinePatch};
use crate::validate::ConfigError;

/// A configuration that may lack its kernel. As JSON it is a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Draft {
    #[serde(rename = "machine-config")]
    machine: MachineConfig,
    #[serde(rename = "boot-source", skip_serializing_if = "Option::is_none")]
    boot: Option<BootSource>,
    drives: Vec<Drive>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<Container>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vsock: Option<Vsock>,
    serial: Serial,
    confidential: Confidential,
    stop_timeout_ms: u64,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            machine: MachineConfig::default(),
            boot: None,
            drives: Vec::new(),
            container: None,
            vsock: None,
            serial: Serial::default(),
            confidential: Confidential::default(),
            stop_timeout_ms: default_stop_timeout_ms(),
        }
    }
}

impl From<DomainConfig> for Draft {
    fn from(config: DomainConfig) -> Self {
        // Where log and metrics go is the monitor's affair, not the domain's.
        let DomainConfig {
            machine,
            boot,
            drives,
            container,
            vsock,
            serial,
            confidential,
            stop_timeout_ms,
            logger: _,
            metrics: _,
        } = config;
        Self { machine, boot: Some(boot), drives, container, vsock, serial, confidential, stop_timeout_ms }
    }
}

impl Draft {
    /// The configuration, if it is complete.
    pub fn complete(&self) -> Result<DomainConfig, ActionError> {
        self.boot.clone().map(|boot| self.with(boot)).ok_or(ActionError::NoBootSource)
    }

    /// vCPUs and memory.
    pub fn machine(&self) -> &MachineConfig {
        &self.machine
    }

    /// What is started, if that is known yet.
    pub fn boot(&self) -> Option<&BootSource> {
        self.boot.as_ref()
    }

    /// The drives, in the order of their slots.
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// The container.
    pub fn container(&self) -> Option<&Container> {
        self.container.as_ref()
    }

    /// How the domain is protected.
    pub fn confidential(&self) -> &Confidential {
        &self.confidential
    }

    /// The vsock device.
    pub fn vsock(&self) -> Option<&Vsock> {
        self.vsock.as_ref()
    }

    /// The console.
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// The index of a drive and what it is with `patch`, if that is good. `None`: there is no drive of that id.
    pub fn patched_drive(&self, patch: &DrivePatch) -> Option<Result<(usize, Drive), ConfigError>> {
        let index = self.drives.iter().position(|drive| drive.drive_id == patch.drive_id)?;
        let drive = patch.apply(self.drives.get(index)?);
        Some(self.clone().put_drive(drive.clone()).map(|()| (index, drive)))
    }

    /// Replaces everything.
    pub fn put_config(&mut self, config: DomainConfig) -> Result<(), ConfigError> {
        self.change(|draft| *draft = config.into())
    }

    /// Replaces vCPUs and memory.
    pub fn put_machine(&mut self, machine: MachineConfig) -> Result<(), ConfigError> {
        self.change(|draft| draft.machine = machine)
    }

    /// Changes vCPUs or memory.
    pub fn patch_machine(&mut self, patch: MachinePatch) -> Result<(), ConfigError> {
        let machine = patch.apply(&self.machine)?;
        self.put_machine(machine)
    }

    /// Replaces what is started.
    pub fn put_boot(&mut self, boot: BootSource) -> Result<(), ConfigError> {
        self.change(|draft| draft.boot = Some(boot))
    }

    /// Replaces the drive of that id, or adds one behind the others; the root device comes first.
    pub fn put_drive(&mut self, drive: Drive) -> Result<(), ConfigError> {
        self.change(|draft| {
            match draft.drives.iter_mut().find(|old| old.drive_id == drive.drive_id) {
                Some(old) => *old = drive,
                None => draft.drives.push(drive),
            }
            root_first(&mut draft.drives);
        })
    }

    /// Replaces the vsock device.
    pub fn put_vsock(&mut self, vsock: Vsock) -> Result<(), ConfigError> {
        self.change(|draft| draft.vsock = Some(vsock))
    }

    /// Replaces where the console goes.
    pub fn put_serial(&mut self, serial: Serial) -> Result<(), ConfigError> {
        self.change(|draft| draft.serial = serial)
    }

    fn change(&mut self, change: impl FnOnce(&mut Self)) -> Result<(), ConfigError> {
        let mut changed = self.clone();
        change(&mut changed);
        changed.validate()?;
        *self = changed;
        Ok(())
    }

    /// Checks everything, with a kernel that is beyond reproach if there is none yet.
    fn validate(&self) -> Result<(), ConfigError> {
        let boot = self.boot.clone().unwrap_or_else(|| BootSource {
            kernel_image_path: Some("kernel".into()),
            ..BootSource::default()
        });
        self.with(boot).validate()
    }

    fn with(&self, boot: BootSource) -> DomainConfig {
        DomainConfig {
            machine: self.machine.clone(),
            boot,
            drives: self.drives.clone(),
            container: self.container.clone(),
            vsock: self.vsock.clone(),
            serial: self.serial.clone(),
            confidential: self.confidential.clone(),
            stop_timeout_ms: self.stop_timeout_ms,
            logger: None,
            metrics: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn drive(id: &str, root: bool) -> Drive {
        serde_json::from_value(json!({"drive_id": id, "path_on_host": "d", "is_root_device": root})).unwrap()
    }

    fn boot() -> BootSource {
        serde_json::from_value(json!({"kernel_image_path": "k"})).unwrap()
    }

    #[test]
    fn pieces_make_a_configuration() {
        let mut draft = Draft::default();
        assert_eq!(draft.complete(), Err(ActionError::NoBootSource));
        draft.put_machine(MachineConfig { vcpu_count: 2, mem_size_mib: 64 }).unwrap();
        draft.patch_machine(MachinePatch { vcpu_count: Some(3), mem_size_mib: None }).unwrap();
        draft.put_drive(drive("a", false)).unwrap();
        draft.put_drive(drive("b", true)).unwrap();
        draft.put_drive(drive("b", false)).unwrap();
        draft.put_drive(drive("a", true)).unwrap();
        draft.put_vsock(Vsock { guest_cid: 3, uds_path: "v".into() }).unwrap();
        draft.put_boot(boot()).unwrap();
        let config = draft.complete().unwrap();
        assert_eq!(config.machine, MachineConfig { vcpu_count: 3, mem_size_mib: 64 });
        let ids: Vec<_> = config.drives.iter().map(|drive| drive.drive_id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        assert!(config.drives[0].is_root_device);
        let text = serde_json::to_vec(&draft).unwrap();
        assert_eq!(DomainConfig::from_json(&text).unwrap(), config);
        assert_eq!(Draft::from(config), draft);
    }

    #[test]
    fn the_root_device_comes_first_whenever_it_is_put() {
        let mut draft = Draft::default();
        for id in ["a", "b", "root", "c"] {
            draft.put_drive(drive(id, id == "root")).unwrap();
        }
        let ids = |draft: &Draft| draft.drives.iter().map(|drive| drive.drive_id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&draft), ["root", "a", "b", "c"]);
        // Another one takes its place once it has given it up.
        assert!(draft.put_drive(drive("c", true)).is_err());
        draft.put_drive(drive("root", false)).unwrap();
        draft.put_drive(drive("c", true)).unwrap();
        assert_eq!(ids(&draft), ["c", "root", "a", "b"]);
        draft.put_boot(boot()).unwrap();
        assert!(draft.complete().unwrap().command_line().ends_with(" root=/dev/vda rw"));
    }

    #[test]
    fn a_patch_of_a_drive_changes_what_it_names() {
        let bucket = |size| json!({"size": size, "refill_time": 100});
        let mut draft = Draft::default();
        let mut limited = drive("a", false);
        limited.rate_limiter =
            serde_json::from_value(json!({"bandwidth": bucket(1), "ops": bucket(2)})).unwrap();
        draft.put_drive(drive("first", false)).unwrap();
        draft.put_drive(limited.clone()).unwrap();
        let patched = |patch: serde_json::Value| {
            let patch = serde_json::from_value::<DrivePatch>(patch).unwrap();
            draft.patched_drive(&patch).map(|patched| {
                patched.map(|(index, drive)| {
                    assert_eq!(index, 1);
                    drive
                })
            })
        };
        assert_eq!(patched(json!({"drive_id": "a"})), Some(Ok(limited.clone())));
        assert_eq!(patched(json!({"drive_id": "b"})), None);
        let other = patched(json!({"drive_id": "a", "path_on_host": "other"})).unwrap().unwrap();
        assert_eq!(other, Drive { path_on_host: "other".into(), ..limited.clone() });
        let ops = patched(json!({"drive_id": "a", "rate_limiter": {"ops": bucket(5)}})).unwrap().unwrap();
        let limiter = ops.rate_limiter.unwrap();
        assert_eq!((limiter.bandwidth.unwrap().size, limiter.ops.unwrap().size), (1, 5));
        let none = json!({"drive_id": "a", "rate_limiter": {"ops": bucket(0), "bandwidth": bucket(0)}});
        assert_eq!(patched(none).unwrap().unwrap().rate_limiter, None);
        let empty = patched(json!({"drive_id": "a", "path_on_host": ""})).unwrap();
        assert_eq!(empty.unwrap_err().to_string(), "drives[1].path_on_host: is empty");
    }

    #[test]
    fn a_bad_piece_changes_nothing() {
        let mut draft = Draft::default();
        draft.put_drive(drive("a", true)).unwrap();
        let before = draft.clone();
        assert!(matches!(draft.put_drive(drive("b", true)), Err(ConfigError::SecondRoot { .. })));
        assert!(draft.put_machine(MachineConfig { vcpu_count: 0, mem_size_mib: 64 }).is_err());
        let patch = MachinePatch { vcpu_count: Some(256), mem_size_mib: None };
        assert_eq!(
            draft.patch_machine(patch).unwrap_err().to_string(),
            "machine-config.vcpu_count: 256 is not between 1 and 32"
        );
        assert!(draft.put_vsock(Vsock { guest_cid: 2, uds_path: "v".into() }).is_err());
        assert!(draft.put_boot(BootSource { kernel_image_path: Some("".into()), ..boot() }).is_err());
        let mut config = DomainConfig::from_json(br#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap();
        config.stop_timeout_ms = u64::MAX;
        assert!(draft.put_config(config).is_err());
        assert_eq!(draft, before);
    }
}
