//! The command line.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Maps, per process, the variant of the guest's kernel text that a signed policy names.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "DOM is a domain's name or id, as `xl list` shows it. Run it as root in dom0.\n\
                  Exit codes: 0 done or yes; 1 a clean no; 2 wrong usage, bad input or cannot be done; \
                  3 no privilege, no Xen, or a Xen or domain without the interface."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build the views of a running guest, bind its processes, and keep watching
    #[command(after_help = "\
Example:
  installer apply web1 --bundle /boot/penumbra/bundle --policy web-tier.toml --trust ops.pub.pem

The bundle's envelope is BUNDLE/statement.dsse.json, the policy's POLICY.dsse.json (`signer sign` writes both). Nothing is
touched in the guest before both verify and every byte of its running text is explained. The guest is never paused.

SIGINT, SIGTERM and `installer remove` end the watching. Views stay then, but bindings are dropped: nobody watches any
more, so every process runs on the default view. After SIGKILL a binding stays until its process ends, runs another
program or changes its user. `apply` on a guest to which the same bundle is applied takes over where the last one ended.

A guest that reboots comes back as another domain with the same UUID: `apply` waits for its kernel to be up and applies
again. A guest that starts another kernel (kexec) is told from one that does not: its views are taken out.

Exit code while watching: 0 stopped as asked, or the guest powered off or was destroyed; 1 the guest crashed, went down to
reboot and did not come back, or runs another kernel; 2 Xen or the guest refused.")]
    Apply(Apply),
    /// Show each process with its view, as Xen has it, and the rule that chose it
    #[command(
        after_help = "A `!` marks a process whose view in Xen is not the one that the policy gives it: for one poll \
interval after it started that is normal, later it is not."
    )]
    Ps(Domain),
    /// Show what is applied, and Xen's counters
    Status {
        /// Name or id; all domains without it
        #[arg(value_name = "DOM")]
        domain: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take everything out of a guest
    #[command(
        after_help = "Stops the `apply` that watches the guest, puts every vCPU on the stock text, removes views and \
copies, and puts the cave's filler back once nothing can be running there. May be repeated; succeeds when nothing is there.

The hook code in the cave stays (`cave left`) if some thread may still go on in it: frames of sleeping threads are followed
by the kernel's own ORC table, what these do not reach counts if it looks like an address of the cave. Nothing jumps there
any more, and the journal keeps it: the next `remove`, or `apply`, looks again.

Refused while a probe of the guest's (kprobe, perf, BPF) stands on a return or call that a view has edited: taken away \
after the views are gone, it could leave the view's bytes in the guest's text."
    )]
    Remove(Remove),
    /// Print the SHA-256 of the guest's kernel text as the stock view has it
    Digest {
        /// Name or id
        #[arg(value_name = "DOM")]
        domain: String,
        /// The bundle of the guest's kernel
        #[arg(long, value_name = "DIR")]
        bundle: PathBuf,
        /// Also say how many bytes differ from the file, by the table of the image that explains them, or name what none
        /// explains, and whether the bundle's hook code is in the cave
        #[arg(long)]
        explain: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Explain every byte of every view, or name what cannot be explained
    #[command(
        after_help = "Exit code 0: every view is the guest's own text plus its variant's edits. 1: it is not."
    )]
    VerifyText(Domain),
    /// Write a variant's text over a dump of running text, without a guest
    #[command(after_help = "\
Example, of a guest booted with nokaslr in QEMU, whose monitor wrote text.dump (`pmemsave 0x1000000 SIZE text.dump`):
  installer fill --bundle bundle --variant hardened --text text.dump --output hardened.text
  objdump -D -b binary -m i386:x86-64 hardened.text

Every byte of the dump is explained first, exactly as before an apply, and the output is what that view would show: an
auditor sees what a guest would run, and a machine without Xen can be given it. No signature is asked for, nothing is mapped.
The size is that of BUNDLE/text.bin. Exit code 1: bytes of the dump cannot be explained; they are named.")]
    Fill(Fill),
    /// Flip live processes between all views at random moments, then verify the text
    #[command(after_help = "\
Example:
  installer storm web1 --pid 312 --pid 340 --flips 1000 --seed 7

A running `apply` leaves these processes alone meanwhile and binds them again afterwards.")]
    Storm(Storm),
    /// Show the audit log of a domain: what was bound, stopped, refused
    #[command(after_help = "\
Examples:
  installer events web1
  installer events web1 -f --only violation
  installer events --uuid 9f8c... --json      the log of a domain that is not there any more

The log is /var/log/penumbra/UUID.jsonl (PENUMBRA_LOG names another directory): a JSON object per line, each with the
SHA-256 of the line before it. Exit code 1: the chain is broken; the lines are named.")]
    Events(Events),
    /// Look at policies without a guest
    #[command(subcommand)]
    Policy(Policy),
    /// Ask Xen what the tests ask the fake
    #[cfg(feature = "lab")]
    Contract {
        /// Name or id; nothing may be applied to it
        #[arg(value_name = "DOM")]
        domain: String,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// A domain and how to print.
#[derive(Debug, Args)]
pub struct Domain {
    /// Name or id
    #[arg(value_name = "DOM")]
    pub domain: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `remove`.
#[derive(Debug, Args)]
pub struct Remove {
    /// Which guest, and how to print
    #[command(flatten)]
    pub domain: Domain,
    /// Do it even though probes stand on edited returns or calls: the guest may crash when they go
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `apply`.
#[derive(Debug, Args)]
pub struct Apply {
    /// Name or id
    #[arg(value_name = "DOM")]
    pub domain: String,
    /// The bundle that `hardener emit` wrote for the guest's kernel
    #[arg(long, value_name = "DIR")]
    pub bundle: PathBuf,
    /// The trust policy
    #[arg(long, value_name = "FILE")]
    pub policy: PathBuf,
    /// A public key whose signature counts; may be given again
    #[arg(long, value_name = "PUB.pem", required = true)]
    pub trust: Vec<PathBuf>,
    /// How many distinct trusted keys must have signed
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threshold: usize,
    /// Build the views and end; nothing is bound, so every process runs on the default view
    #[arg(long)]
    pub once: bool,
    /// Time between looks at the guest's processes
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub poll_ms: u64,
}

/// Arguments of `fill`.
#[derive(Debug, Args)]
pub struct Fill {
    /// The bundle of the dump's kernel
    #[arg(long, value_name = "DIR")]
    pub bundle: PathBuf,
    /// The variant: stock, fast or hardened
    #[arg(long, value_name = "NAME")]
    pub variant: String,
    /// The running text, from its first byte to its last
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// How far KASLR moved the kernel, in hexadecimal
    #[arg(long, value_name = "HEX", default_value = "0", value_parser = hexadecimal)]
    pub slide: u64,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// A number in hexadecimal, with or without `0x`.
fn hexadecimal(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).map_err(|error| error.to_string())
}

/// Arguments of `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Name or id
    #[arg(value_name = "DOM", required_unless_present = "uuid")]
    pub domain: Option<String>,
    /// The domain's UUID instead, also of one that has gone
    #[arg(long, value_name = "UUID", conflicts_with = "domain", value_parser = uuid)]
    pub uuid: Option<String>,
    /// Go on as the log grows, until SIGINT or SIGTERM
    #[arg(short, long)]
    pub follow: bool,
    /// Only events of this kind
    #[arg(long, value_name = "EVENT", value_parser = ["applied", "bound", "unbound", "lapsed", "violation", "entered", "unknown-trap",
        "refused", "lost", "mapped", "stays", "unmapped", "overflow", "removed", "stopped", "ended"])]
    pub only: Option<String>,
    /// Count them instead: by kind, by what was called or stopped, and by program
    #[arg(long, conflicts_with = "follow")]
    pub count: bool,
    /// Print the log's own lines, or with --count one object
    #[arg(long)]
    pub json: bool,
}

/// A UUID, with or without dashes.
fn uuid(text: &str) -> Result<String, String> {
    let digits = text.replace('-', "").to_lowercase();
    if digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(digits)
    } else {
        Err("a UUID has 32 hexadecimal digits".to_owned())
    }
}

/// Arguments of `storm`.
#[derive(Debug, Args)]
pub struct Storm {
    /// Name or id
    #[arg(value_name = "DOM")]
    pub domain: String,
    /// A process to flip; may be given again, the flips are spread over all
    #[arg(long, value_name = "PID", required = true)]
    pub pid: Vec<u32>,
    /// How many flips in all
    #[arg(long, value_name = "N")]
    pub flips: u64,
    /// Seed of the random moments; one is chosen and printed without it
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// The longest wait between two flips; 0 never waits
    #[arg(long, value_name = "N", default_value_t = 3000)]
    pub wait_us: u64,
    /// Do not verify the text afterwards
    #[arg(long)]
    pub no_verify: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Commands about policies.
#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Check a policy file: all errors at once, with their places
    Check {
        /// The file
        file: PathBuf,
    },
}
