//! What failed, and what to do about it.

use fuse_backing::{
    BackingCloseCause, BackingOpenError, DeviceOpenError, Errno, NegotiateError, NotPermitted,
    Scope,
};

pub(crate) const LOOK_INTO_THE_LOG: &str = "look into the kernel's log";

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

impl From<DeviceOpenError> for Failure {
    fn from(error: DeviceOpenError) -> Self {
        let advice = match error {
            DeviceOpenError::Missing => {
                "load the module with `modprobe fuse`; start a container with `--device /dev/fuse`"
            }
            DeviceOpenError::NoDriver { .. } => {
                "load the module with `modprobe fuse`, or boot a kernel with CONFIG_FUSE_FS"
            }
            DeviceOpenError::Denied { .. } if error.errno() == Errno::ACCESS => {
                "run it as root, which registering files takes as well"
            }
            DeviceOpenError::Denied { .. } => {
                "a device cgroup denies it: start the container with `--device /dev/fuse`"
            }
            DeviceOpenError::NotFuse(_) => {
                "put the real node there: `mknod -m 666 /dev/fuse c 10 229`"
            }
            _ => by_scope(error.scope()),
        };
        Self::new(error, advice)
    }
}

impl From<NotPermitted> for Failure {
    fn from(error: NotPermitted) -> Self {
        Self::new(error, to_be_permitted(error))
    }
}

impl From<NegotiateError> for Failure {
    fn from(error: NegotiateError) -> Self {
        let advice = match error {
            NegotiateError::NotPermitted(why) => to_be_permitted(why),
            NegotiateError::NotOffered => "boot Linux 6.9 or newer with CONFIG_FUSE_PASSTHROUGH=y",
            _ => "look at what the INIT reply asks for",
        };
        Self::new(error, advice)
    }
}

impl From<BackingOpenError> for Failure {
    fn from(error: BackingOpenError) -> Self {
        let advice = match error {
            BackingOpenError::UnsupportedKernel => "boot Linux 6.9 or newer",
            BackingOpenError::DisabledInKernel => "boot a kernel with CONFIG_FUSE_PASSTHROUGH=y",
            BackingOpenError::Unimplemented => {
                "run it without the emulator, or with a seccomp profile that lets ioctl(2) through"
            }
            BackingOpenError::NotPermitted(why) => to_be_permitted(why),
            BackingOpenError::Other(_) => LOOK_INTO_THE_LOG,
            BackingOpenError::StackedTooDeep => {
                "serve such files without passthrough, or keep them on a filesystem beneath"
            }
            _ => by_scope(error.scope()),
        };
        Self::new(error, advice)
    }
}

impl From<BackingCloseCause> for Failure {
    fn from(cause: BackingCloseCause) -> Self {
        let advice = match cause {
            BackingCloseCause::NotPermitted(why) => to_be_permitted(why),
            _ => LOOK_INTO_THE_LOG,
        };
        Self::new(cause, advice)
    }
}

fn to_be_permitted(error: NotPermitted) -> &'static str {
    match error {
        NotPermitted::NotInInitialUserNamespace => {
            "run it as the machine's root, outside of rootless containers and user namespaces"
        }
        NotPermitted::MissingCapability => {
            "run it as root; start a container with `--cap-add SYS_ADMIN`"
        }
        // The doctor's INIT reply is right.
        _ => "look for the security policy that denies it: seccomp, SELinux, AppArmor",
    }
}

fn by_scope(scope: Scope) -> &'static str {
    match scope {
        Scope::File => "serve such files without passthrough",
        Scope::Transient => "try again",
        _ => LOOK_INTO_THE_LOG,
    }
}
