//! Failures: the cause, and advice.

use fuse_backing::error::Errno;
use fuse_backing::error::{BackingError, DeviceError, NegotiateError, NotPermitted, Scope};

pub(crate) const CHECK_THE_LOG: &str = "check the kernel log (dmesg)";

#[derive(Clone)]
pub(crate) struct Failure {
    pub(crate) cause: String,
    pub(crate) advice: String,
}

impl Failure {
    pub(crate) fn new(cause: impl ToString, advice: impl ToString) -> Self {
        Self {
            cause: cause.to_string(),
            advice: advice.to_string(),
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let advice = match error {
            DeviceError::Missing => {
                "load the module with `modprobe fuse`; for a container, add `--device /dev/fuse`"
            }
            DeviceError::NoDriver(_) => {
                "load the module with `modprobe fuse`, or boot a kernel with CONFIG_FUSE_FS"
            }
            DeviceError::Denied(_) if error.errno() == Errno::ACCESS => {
                "run it as root; registering files needs root too"
            }
            DeviceError::Denied(_) => {
                "a device cgroup denies it: start the container with `--device /dev/fuse`"
            }
            DeviceError::NotCharacterDevice(_) | DeviceError::OtherDevice { .. } => {
                "replace it with the device node: `mknod -m 666 /dev/fuse c 10 229`"
            }
            _ => by_scope(error.scope()),
        };
        Self::new(error, advice)
    }
}

impl From<NotPermitted> for Failure {
    fn from(error: NotPermitted) -> Self {
        Self::new(error, advice_on_permission(error))
    }
}

impl From<NegotiateError> for Failure {
    fn from(error: NegotiateError) -> Self {
        let advice = match error {
            NegotiateError::NotPermitted(why) => advice_on_permission(why),
            NegotiateError::NotOffered => "boot Linux 6.9 or newer with CONFIG_FUSE_PASSTHROUGH=y",
            _ => "check what the INIT reply requests",
        };
        Self::new(error, advice)
    }
}

impl From<BackingError> for Failure {
    fn from(error: BackingError) -> Self {
        let advice = match error {
            BackingError::UnsupportedKernel => "boot Linux 6.9 or newer",
            BackingError::DisabledInKernel => "boot a kernel with CONFIG_FUSE_PASSTHROUGH=y",
            BackingError::Unimplemented => {
                "run it without the emulator, or with a seccomp profile that allows ioctl(2)"
            }
            BackingError::NotPermitted(why) => advice_on_permission(why),
            BackingError::UnknownId | BackingError::Other(_) => CHECK_THE_LOG,
            BackingError::StackedTooDeep => {
                "serve such files without passthrough, or move them to a less deeply stacked filesystem"
            }
            _ => by_scope(error.scope()),
        };
        Self::new(error, advice)
    }
}

fn advice_on_permission(error: NotPermitted) -> &'static str {
    match error {
        NotPermitted::NotInInitialUserNamespace => {
            "run it as the machine's root, outside of rootless containers and user namespaces"
        }
        NotPermitted::MissingCapability => {
            "run it as root; for a container, add `--cap-add SYS_ADMIN`"
        }
        // An error in the INIT reply is ruled out: the doctor's own reply is correct.
        _ => "find the security policy that denies it: seccomp, SELinux, AppArmor",
    }
}

fn by_scope(scope: Scope) -> &'static str {
    match scope {
        Scope::File => "serve such files without passthrough",
        Scope::Transient => "try again",
        _ => CHECK_THE_LOG,
    }
}
