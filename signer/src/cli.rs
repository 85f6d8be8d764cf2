//! The command line. Data goes to stdout, messages to stderr; `--json` changes stdout only.

use crate::exit::Error;
use crate::keys::{self, PublicKey, SigningKey};
use crate::verify::{self, ENVELOPE};
use crate::{FileError, Trust, VerifyError, files, sign};
use clap::{Args, CommandFactory, Parser, Subcommand};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Signs and verifies Penumbra's bundles and policies.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done or verified; 1 not verified; 2 wrong usage, bad input or cannot be done.\n\
                  No command touches the network."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make and show keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Sign a bundle directory or a policy file
    #[command(after_help = "Examples:\n  \
        signer sign bundle --key alice.pem          writes bundle/statement.dsse.json\n  \
        signer sign bundle --key bob.pem            adds a second signature to it\n  \
        signer sign payroll.toml --key alice.pem    writes payroll.toml.dsse.json")]
    Sign(Sign),
    /// Verify a bundle directory or a policy file
    #[command(after_help = "Examples:\n  \
        signer verify bundle --trust alice.pub.pem\n  \
        signer verify bundle --trust alice.pub.pem --trust bob.pub.pem --threshold 2\n\n\
        Without this program: --emit-pae DIR writes the signed bytes and each signature, and prints the\n\
        openssl commands that check them.")]
    Verify(Verify),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Make an Ed25519 key: NAME.pem, readable by you alone, and NAME.pub.pem
    #[command(after_help = "Example:\n  \
        signer key new -o alice    writes alice.pem (keep it secret) and alice.pub.pem (give it to verifiers)\n\n\
        openssl reads both: openssl pkey -in alice.pem -noout -text")]
    New {
        /// Where: a path without the .pem
        #[arg(short, long, value_name = "NAME")]
        output: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a key's id and its public half
    Show {
        /// A private or public key file
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Sign {
    /// The bundle directory or policy file
    path: PathBuf,
    /// The private key
    #[arg(long, value_name = "NAME.pem")]
    key: PathBuf,
    /// Write the envelope here instead of where verifiers look for it
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Drop the signatures of an envelope that is over other contents
    #[arg(long)]
    replace: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Verify {
    /// The bundle directory or policy file
    path: PathBuf,
    /// A public key whose signature counts; may be given again
    #[arg(long, value_name = "PUB.pem", required = true)]
    trust: Vec<PathBuf>,
    /// How many distinct trusted keys must have signed
    #[arg(long, value_name = "N", default_value_t = 1)]
    threshold: usize,
    /// The envelope, when it is not where `sign` puts it
    #[arg(long, value_name = "FILE")]
    envelope: Option<PathBuf>,
    /// Write the signed bytes and the signatures to DIR, verified or not
    #[arg(long, value_name = "DIR")]
    emit_pae: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Key(KeyCommand::New { output, json }) => key_new(&output, json),
        Command::Key(KeyCommand::Show { file, json }) => key_show(&file, json),
        Command::Sign(args) => sign_path(&args),
        Command::Verify(args) => verify_path(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "signer", &mut script);
            Ok(String::from_utf8_lossy(&script).into_owned())
        }
    };
    match result {
        Ok(text) => {
            print(&text);
            ExitCode::from(crate::exit::YES)
        }
        Err(error) => {
            eprintln!("signer: {error}");
            ExitCode::from(&error)
        }
    }
}

/// A reader that has gone away (`signer key show | head -1`) is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn line(value: &Value) -> String {
    format!("{value}\n")
}

fn key_new(name: &Path, as_json: bool) -> Result<String, Error> {
    let key = keys::new(name)?;
    let (private, public) = (key.private_file.display(), key.public_file.display());
    let keyid = key.public.key_id();
    if as_json {
        return Ok(line(&json!({
            "schema": "penumbra.key/v1",
            "keyid": keyid,
            "kind": "private",
            "private_file": private.to_string(),
            "public_file": public.to_string(),
            "public_pem": key.public.to_pem(),
        })));
    }
    Ok(format!(
        "key id   {keyid}\nprivate  {private} (keep it secret)\npublic   {public} (give it to verifiers)\n"
    ))
}

fn key_show(file: &Path, as_json: bool) -> Result<String, Error> {
    let (kind, public) = match PublicKey::read(file) {
        Err(keys::KeyError::Label { label, .. }) if label == keys::PRIVATE_LABEL => {
            ("private", SigningKey::read(file)?.public())
        }
        key => ("public", key?),
    };
    let (keyid, pem) = (public.key_id(), public.to_pem());
    if as_json {
        return Ok(line(&json!({
            "schema": "penumbra.key/v1", "keyid": keyid, "kind": kind, "public_pem": pem,
        })));
    }
    Ok(format!(
        "key id  {keyid}\nkind    Ed25519 {kind} key\n{pem}"
    ))
}

fn sign_path(args: &Sign) -> Result<String, Error> {
    let key = SigningKey::read(&args.key)?;
    let signed = sign::sign(&args.path, &key, args.output.as_deref(), args.replace)?;
    let (envelope, keyid, signatures) =
        (signed.envelope.display(), &signed.keyid, signed.signatures);
    if args.json {
        return Ok(line(&json!({
            "schema": "penumbra.signature/v1",
            "envelope": envelope.to_string(),
            "keyid": keyid,
            "signatures": signatures,
            "added": signed.added,
        })));
    }
    let did = if signed.added {
        "signed"
    } else {
        "was signed already"
    };
    Ok(format!(
        "{did}: {envelope}, {signatures} signature(s)\nkey id  {keyid}\n"
    ))
}

fn verify_path(args: &Verify) -> Result<String, Error> {
    let trust = Trust::from_pem_files(&args.trust, args.threshold)?;
    let is_bundle = args.path.is_dir();
    let usual = if is_bundle {
        args.path.join(ENVELOPE)
    } else {
        verify::envelope_of_policy(&args.path)
    };
    let envelope = args.envelope.as_ref().unwrap_or(&usual);
    // Before the verdict: whoever wants to check a refusal needs these files most.
    let commands = match &args.emit_pae {
        Some(dir) => emit_pae(dir, envelope, &trust)?,
        None => String::new(),
    };
    let verified = if is_bundle {
        verify::verify_bundle_with(&args.path, envelope, &trust)
            .map(|bundle| (bundle.statement, bundle.keyids))
    } else {
        verify::verify_policy_with(&args.path, envelope, &trust)
            .map(|policy| (policy.statement, policy.keyids))
    };
    let (statement, keyids) = match verified {
        Ok(verified) => verified,
        Err(error) => {
            print(&if args.json {
                line(&refusal(&error))
            } else {
                commands
            });
            return Err(error.into());
        }
    };
    if args.json {
        return Ok(line(&json!({
            "schema": "penumbra.verification/v1",
            "verified": true,
            "keyids": keyids,
            "threshold": trust.threshold(),
            "predicate_type": statement.predicate_type,
            "predicate": statement.predicate,
            "files": statement.files,
        })));
    }
    let mut text = format!(
        "verified: {}\n  {} file(s), signed by {} of {} trusted key(s), {} needed:\n",
        args.path.display(),
        statement.files.len(),
        keyids.len(),
        trust.keys().count(),
        trust.threshold(),
    );
    for (key, file) in trust
        .keys()
        .filter(|(key, _)| keyids.contains(&key.key_id()))
    {
        let _ = writeln!(text, "  {} {}", key.key_id(), file.display());
    }
    if let Some(kernel) = statement.predicate.get("kernel") {
        let field = |name| {
            kernel
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or("?")
                .escape_debug()
        };
        let _ = writeln!(
            text,
            "  kernel {}, build-id {}",
            field("release"),
            field("build_id")
        );
    }
    Ok(text + &commands)
}

fn refusal(error: &VerifyError) -> Value {
    json!({
        "schema": "penumbra.verification/v1",
        "verified": false,
        "reason": error.code(),
        "message": error.to_string(),
    })
}

/// Writes what is signed and each signature, and says how openssl checks them.
///
/// openssl needs files: `pkeyutl -rawin` refuses a pipe for Ed25519.
fn emit_pae(dir: &Path, envelope: &Path, trust: &Trust) -> Result<String, Error> {
    let envelope = verify::read_envelope(envelope)?;
    std::fs::create_dir_all(dir).map_err(|source| FileError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let message = envelope.pae();
    let pae = dir.join("statement.pae");
    files::write(&pae, &message, 0o644, true)?;
    let mut commands = "check with openssl:\n".to_owned();
    for (index, signature) in envelope.signatures.iter().enumerate() {
        let sig = dir.join(format!("signature-{}.bin", index + 1));
        files::write(&sig, &signature.sig, 0o644, true)?;
        // One that no trusted key made is shown with all of them: openssl will say so too.
        let by = |key: PublicKey| key.verifies(&message, &signature.sig);
        let known = trust.keys().any(|(key, _)| by(key));
        for (_, file) in trust.keys().filter(|(key, _)| !known || by(*key)) {
            let _ = writeln!(
                commands,
                "  openssl pkeyutl -verify -pubin -inkey {} -rawin -in {} -sigfile {}",
                file.display(),
                pae.display(),
                sig.display()
            );
        }
    }
    let _ = writeln!(
        commands,
        "what {} says of the files: tail -c {} {}",
        pae.display(),
        envelope.payload.len(),
        pae.display()
    );
    Ok(commands)
}
