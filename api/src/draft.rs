//! A configuration that clients put together piece by piece. It is good at any time, but for the kernel that
//! it may still lack: a piece that would make it wrong is refused, and nothing changes.

use serde::Serialize;

use crate::actions::ActionError;
use crate::config::{
    BootSource, Confidential, DomainConfig, Drive, MachineConfig, Serial, Vsock, default_stop_timeout_ms,
};
use crate::requests::MachinePatch;
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
        let DomainConfig { machine, boot, drives, vsock, serial, confidential, stop_timeout_ms, .. } = config;
        Self { machine, boot: Some(boot), drives, vsock, serial, confidential, stop_timeout_ms }
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

    /// Whether there is a drive of that id.
    pub fn has_drive(&self, id: &str) -> bool {
        self.drives.iter().any(|drive| drive.drive_id == id)
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

    /// Replaces the drive of that id, or adds one behind the others.
    pub fn put_drive(&mut self, drive: Drive) -> Result<(), ConfigError> {
        self.change(|draft| match draft.drives.iter_mut().find(|old| old.drive_id == drive.drive_id) {
            Some(old) => *old = drive,
            None => draft.drives.push(drive),
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
            kernel_image_path: "kernel".into(),
            initrd_path: None,
            boot_args: None,
            boot_protocol: Default::default(),
        });
        self.with(boot).validate()
    }

    fn with(&self, boot: BootSource) -> DomainConfig {
        DomainConfig {
            machine: self.machine.clone(),
            boot,
            drives: self.drives.clone(),
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
        assert!(draft.put_boot(BootSource { kernel_image_path: "".into(), ..boot() }).is_err());
        let mut config = DomainConfig::from_json(br#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap();
        config.stop_timeout_ms = u64::MAX;
        assert!(draft.put_config(config).is_err());
        assert_eq!(draft, before);
    }
}
