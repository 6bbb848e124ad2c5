//! Unmodified AWS SDKs as programs to be run in a pod: each takes its credentials from wherever its own
//! default chain finds them, which can only be the metadata service, and prints what it got as JSON.
//!
//! They are made once, outside any namespace, because that takes the network: `sdk-client prepare` does.
//! Knows nothing of namespaces.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};

pub const REGION: &str = "eu-central-1";

const REQUIREMENTS: &str = include_str!("../sdk/requirements.txt");
/// In the virtual environment, the requirements that it was made for.
const INSTALLED: &str = "requirements.txt";
const BOTO3_IDENTITY: &str = "boto3_identity.py";
const BOTO_CREDENTIALS: &str = "boto_credentials.py";

/// aws-config's default chain, then `GetCallerIdentity` at `sts_url`. Prints `arn`, `account`,
/// `access_key_id`.
pub fn rust(sts_url: &str) -> anyhow::Result<Command> {
    let mut command = isolated(&built("sdk-client")?);
    command.args(["identity", "--endpoint-url", sts_url]);
    Ok(command)
}

/// The newest boto3's default chain, then `GetCallerIdentity` at `sts_url`. Prints `arn`, `account`,
/// `access_key_id`, and the `method` by which it found its credentials.
pub fn boto3(sts_url: &str) -> anyhow::Result<Command> {
    let mut command = script(BOTO3_IDENTITY)?;
    command.arg(sts_url);
    Ok(command)
}

/// boto 2.49.0, which knows IMDSv1 only. Prints `access_key_id`.
pub fn boto() -> anyhow::Result<Command> {
    script(BOTO_CREDENTIALS)
}

/// Makes the Python SDKs ready to run.
pub fn prepare() -> anyhow::Result<()> {
    python().map(|_| ())
}

/// Whether they are, so that [`prepare`] takes neither the network nor time.
pub fn is_prepared() -> bool {
    home().is_ok_and(|home| has_requirements(&home))
}

fn script(name: &str) -> anyhow::Result<Command> {
    let mut command = isolated(&python()?);
    command.arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk").join(name));
    Ok(command)
}

/// A command without the settings and files that a default chain would ask before the metadata service.
fn isolated(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .env("HOME", "/nonexistent")
        .env("AWS_REGION", REGION)
        .env("AWS_DEFAULT_REGION", REGION);
    command
}

/// A program of this crate, from beside the running one, or built there.
pub(crate) fn built(name: &str) -> anyhow::Result<PathBuf> {
    let running = env::current_exe()?;
    let folder = running.ancestors().skip(1).find(|folder| !folder.ends_with("deps"));
    let folder = folder.context("a program in a folder")?;
    let program = folder.join(name);
    if program.exists() {
        return Ok(program);
    }
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--bin", name]);
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    run(&mut cargo)?;
    ensure!(program.exists(), "cargo built {name}, but not as {}", program.display());
    Ok(program)
}

/// The interpreter of the virtual environment that has the pinned SDKs, made if there is none yet.
fn python() -> anyhow::Result<PathBuf> {
    let home = home()?;
    let interpreter = home.join("bin/python");
    // Asked before anything is written: the folder may be another user's.
    if has_requirements(&home) {
        return Ok(interpreter);
    }
    let lock = home.with_added_extension("lock");
    fs::create_dir_all(lock.parent().unwrap_or(Path::new("."))).with_context(|| lock.display().to_string())?;
    // Test binaries may come here at the same time.
    let lock = File::create(&lock).with_context(|| lock.display().to_string())?;
    lock.lock()?;
    if has_requirements(&home) {
        return Ok(interpreter);
    }
    install(&home, &interpreter).with_context(|| {
        format!(
            "cannot make {}: it takes Python 3 with its venv module (Debian: python3-venv) and the network, once; \
             `cargo run -p lab --bin sdk-client -- prepare` makes it outside of any namespace",
            home.display()
        )
    })?;
    fs::write(home.join(INSTALLED), REQUIREMENTS)?;
    Ok(interpreter)
}

fn home() -> anyhow::Result<PathBuf> {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    Ok(target.join("lab").join(format!("venv-boto3-{}", pinned("boto3")?)))
}

fn has_requirements(home: &Path) -> bool {
    fs::read_to_string(home.join(INSTALLED)).is_ok_and(|installed| installed == REQUIREMENTS)
}

fn install(home: &Path, interpreter: &Path) -> anyhow::Result<()> {
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(home))?;
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk/requirements.txt");
    let options =
        ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", "--retries=1", "--timeout=10"];
    run(Command::new(interpreter).args(options).args(["--require-hashes", "-r"]).arg(requirements))
}

fn pinned(package: &str) -> anyhow::Result<&'static str> {
    let version = |line: &'static str| line.strip_prefix(package)?.strip_prefix("==")?.split(' ').next();
    REQUIREMENTS.lines().find_map(version).with_context(|| format!("{package} is not pinned"))
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
