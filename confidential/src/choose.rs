//! Which platform a domain gets.

use cofferdam_api::config::PlatformChoice;
use thiserror::Error;

use crate::host::{HostFiles, KvmInterface, SevAttribute, survey};
use crate::image::compose::check_snp_policy;
use crate::image::importer::ImagePlatform;
use crate::image::walk::names;
use crate::plain::Plain;
use crate::platform::Platform;
use crate::snp::{Snp, SnpOptions};

/// Where the secure processor is, below the root.
const SEV_DEVICE: &str = "dev/sev";

/// Why a domain does not get the platform that was asked for.
#[derive(Debug, Error)]
pub enum ChooseError {
    /// The host does not offer it.
    #[error("confidential.platform: this host offers no {platform}: {reason}; {remedy}", platform = .platform.name())]
    Host {
        /// The platform.
        platform: ImagePlatform,
        /// What is missing.
        reason: String,
        /// What would change it.
        remedy: String,
    },
    /// The image is not for it.
    #[error("confidential.platform: the image is not for {platform}, it is for {}", names(has), platform = .platform.name())]
    Image {
        /// The platform.
        platform: ImagePlatform,
        /// Those that the image is for.
        has: Vec<ImagePlatform>,
    },
    /// A kernel that the monitor loads itself is plain to the host.
    #[error("confidential.platform: {platform} needs an image, and the monitor is to load the kernel itself", platform = .0.name())]
    Direct(ImagePlatform),
    /// A guest policy that no launch can have.
    #[error("confidential.snp.policy: {0}")]
    Policy(String),
    /// The monitor is not asked for what a guest wants.
    #[error(
        "confidential.snp.certs: this host's KVM gives guests no certificates; it needs Linux 7.2 or newer, see `cofferdam host check`"
    )]
    Certificates,
    /// None that protects can be had, and it has to be one.
    #[error("confidential.require_protected: {0}")]
    Unprotected(Box<ChooseError>),
    /// The launch was finished, and protects nothing.
    #[error("confidential.require_protected: the guest policy lets the host debug the domain")]
    Exposed,
    /// A plain domain was asked for, and one that is protected.
    #[error("confidential.require_protected: a plain domain is not protected")]
    Plain,
}

/// What is asked of a platform.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Which one.
    pub platform: PlatformChoice,
    /// Whether a domain that the host can read is worse than none.
    pub protected: bool,
    /// What SEV-SNP is asked for.
    pub snp: SnpOptions,
}

/// The best platform that is allowed, and that both the host, with this KVM, and the image offer. `image` has the platforms
/// of the image, or nothing for a kernel that the monitor loads.
pub fn choose(
    kvm: &dyn KvmInterface,
    wanted: Wanted,
    image: Option<&[ImagePlatform]>,
) -> Result<Box<dyn Platform>, ChooseError> {
    choose_on(&HostFiles::default(), kvm, wanted, image)
}

fn choose_on(
    files: &HostFiles,
    kvm: &dyn KvmInterface,
    wanted: Wanted,
    image: Option<&[ImagePlatform]>,
) -> Result<Box<dyn Platform>, ChooseError> {
    match wanted.platform {
        PlatformChoice::Plain if wanted.protected => Err(ChooseError::Plain),
        PlatformChoice::Plain => Ok(Box::new(Plain)),
        PlatformChoice::Snp => snp(files, kvm, wanted.snp, image),
        PlatformChoice::Auto => match snp(files, kvm, wanted.snp, image) {
            Ok(snp) => Ok(snp),
            Err(error @ (ChooseError::Host { .. } | ChooseError::Image { .. } | ChooseError::Direct(_))) => {
                if wanted.protected {
                    Err(ChooseError::Unprotected(error.into()))
                } else {
                    Ok(Box::new(Plain))
                }
            }
            // There would be SEV-SNP, but for what was asked of it.
            Err(error) => Err(error),
        },
    }
}

fn snp(
    files: &HostFiles,
    kvm: &dyn KvmInterface,
    options: SnpOptions,
    image: Option<&[ImagePlatform]>,
) -> Result<Box<dyn Platform>, ChooseError> {
    let platform = ImagePlatform::Snp;
    let has = image.ok_or(ChooseError::Direct(platform))?;
    if !has.contains(&platform) {
        return Err(ChooseError::Image { platform, has: has.to_owned() });
    }
    if let Some(policy) = options.policy {
        check_snp_policy(policy).map_err(|error| ChooseError::Policy(error.to_string()))?;
    }
    let offered = survey::snp::snp(files, Some(kvm));
    if let (false, reason, remedy) = (offered.ok, offered.reason, offered.remedy.unwrap_or_default()) {
        return Err(ChooseError::Host { platform, reason, remedy });
    }
    if options.certificates && kvm.sev_attribute(SevAttribute::CertificateRequests).is_none_or(|yes| yes == 0)
    {
        return Err(ChooseError::Certificates);
    }
    let device = files.path(SEV_DEVICE);
    match Snp::new(&device, options) {
        Ok(snp) => Ok(Box::new(snp)),
        Err(error) => {
            let (reason, remedy) =
                (format!("{}: {error}", device.display()), "`cofferdam host check`".to_owned());
            Err(ChooseError::Host { platform, reason, remedy })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::survey::snp::VM_TYPE;
    use crate::host::tests::{FakeKvm, host};
    use cofferdam_api::status;

    const IMAGE: Option<&[ImagePlatform]> = Some(&[ImagePlatform::Plain, ImagePlatform::Snp]);

    fn kind(
        platform: PlatformChoice,
        protected: bool,
        image: Option<&[ImagePlatform]>,
    ) -> Result<status::Platform, String> {
        let wanted = Wanted { platform, protected, ..Wanted::default() };
        // A KVM without SEV-SNP.
        let chosen = choose(&FakeKvm::default(), wanted, image);
        chosen.map(|platform| platform.kind()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_host_without_protection_is_taken_only_where_that_is_allowed() {
        for image in [IMAGE, None] {
            assert_eq!(kind(PlatformChoice::Auto, false, image), Ok(status::Platform::Plain));
            assert_eq!(kind(PlatformChoice::Plain, false, image), Ok(status::Platform::Plain));
            assert!(kind(PlatformChoice::Auto, true, image).is_err());
            assert!(kind(PlatformChoice::Snp, false, image).is_err());
        }
        let error = kind(PlatformChoice::Plain, true, IMAGE).unwrap_err();
        assert_eq!(error, "confidential.require_protected: a plain domain is not protected");
    }

    #[test]
    fn a_refusal_says_who_lacks_it() {
        let host = kind(PlatformChoice::Snp, false, IMAGE).unwrap_err();
        assert!(host.starts_with("confidential.platform: this host offers no snp: "), "{host}");
        let image = kind(PlatformChoice::Snp, true, Some(&[ImagePlatform::Plain])).unwrap_err();
        assert_eq!(image, "confidential.platform: the image is not for snp, it is for plain");
        let direct = kind(PlatformChoice::Snp, true, None).unwrap_err();
        assert!(direct.contains("snp needs an image"), "{direct}");
        let automatic = kind(PlatformChoice::Auto, true, IMAGE).unwrap_err();
        assert!(automatic.starts_with("confidential.require_protected: "), "{automatic}");
    }

    /// What a host with SEV-SNP, whose KVM says `sev`, does with these wishes.
    fn with_snp(
        sev: [Option<u64>; 3],
        platform: PlatformChoice,
        snp: SnpOptions,
    ) -> Result<status::Platform, String> {
        let (_root, files) = host("svm sev_snp");
        std::fs::write(files.path(SEV_DEVICE), "").unwrap();
        let kvm = FakeKvm { vm_types: 1 | VM_TYPE, sev, ..FakeKvm::default() };
        let chosen = choose_on(&files, &kvm, Wanted { platform, protected: false, snp }, IMAGE);
        chosen.map(|platform| platform.kind()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_snp_cannot_have_is_no_reason_to_go_without_it() {
        let certificates = SnpOptions { certificates: true, ..SnpOptions::default() };
        let policy = SnpOptions { policy: Some(1), ..SnpOptions::default() };
        for platform in [PlatformChoice::Auto, PlatformChoice::Snp] {
            let chosen = |sev, snp: &SnpOptions| with_snp(sev, platform, snp.clone());
            assert_eq!(chosen([None; 3], &SnpOptions::default()), Ok(status::Platform::Snp));
            assert_eq!(chosen([None, None, Some(1)], &certificates), Ok(status::Platform::Snp));
            for old in [None, Some(0)] {
                let error = chosen([None, None, old], &certificates).unwrap_err();
                assert!(error.starts_with("confidential.snp.certs: this host's KVM gives"), "{error}");
            }
            let error = chosen([None; 3], &policy).unwrap_err();
            assert!(error.starts_with("confidential.snp.policy: "), "{error}");
        }
    }
}
