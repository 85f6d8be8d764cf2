//! Without Xen every command that needs it ends with 3 and says what to do.

use std::path::Path;
use std::process::Command;

#[test]
fn commands_that_need_xen_say_so() {
    if Path::new("/dev/xen/privcmd").exists() {
        // In a dom0 they would look at real guests.
        return;
    }
    for arguments in [
        &["ps", "guest"][..],
        &["status"],
        &["status", "guest", "--json"],
        &["remove", "guest"],
        &["verify-text", "guest"],
        &["storm", "guest", "--pid", "1", "--flips", "1"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_installer"))
            .args(arguments)
            .output()
            .expect("the program runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {message}");
        assert!(
            message.contains("as root in dom0"),
            "{arguments:?}: {message}"
        );
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
