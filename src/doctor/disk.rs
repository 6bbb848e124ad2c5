//! What the agent keeps on, and reads from, the node's disk.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use super::finding::Finding;
use crate::{
    clock::UnixTime,
    serve::imds_token::{KEY_FILE, KEY_LENGTH},
};

const STATE: &str = "state-dir";
const RECORDS: &str = "cni-records";
const MOUNT: &str = "mount a folder of the node there (hostPath, daemonset/base/daemonset.yaml), or change --state-dir";

pub(super) fn state_dir(folder: &Path) -> Finding {
    let shown = folder.display();
    let folder_mode = match fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => metadata.permissions().mode() & 0o7777,
        Ok(_) => return Finding::failed(STATE, format!("{shown} is no folder"), MOUNT),
        Err(error) => {
            let detail = format!("{shown}: {error}: session tokens do not outlive a restart of the agent");
            return Finding::warning(STATE, detail, MOUNT);
        }
    };
    // That others may list it shows them a name; the kubelet makes it 0755 where it is missing.
    if folder_mode & 0o022 != 0 {
        let detail = format!("{shown} has mode {folder_mode:04o}: others may replace the key of session tokens");
        return Finding::failed(STATE, detail, format!("chmod 700 {shown}"));
    }
    let key = folder.join(KEY_FILE);
    let shown = key.display();
    let (mode, length) = match fs::metadata(&key) {
        Ok(metadata) => (metadata.permissions().mode() & 0o7777, metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let fix = "the agent makes it when it starts; if it has, its log says why it could not be kept";
            return Finding::warning(STATE, format!("{shown} is not there yet"), fix);
        }
        Err(error) => return Finding::failed(STATE, format!("{shown}: {error}"), MOUNT),
    };
    if mode & 0o077 != 0 {
        let fix = format!("rm {shown}, and restart the agent: it makes another one");
        return Finding::failed(STATE, format!("{shown} has mode {mode:04o}: others may read or change it"), fix);
    }
    if length != KEY_LENGTH as u64 {
        let fix = "restart the agent: it replaces a damaged key; SDKs that hold a session token ask again";
        return Finding::failed(STATE, format!("{shown} has {length} bytes, not {KEY_LENGTH}"), fix);
    }
    Finding::ok(STATE, format!("{shown} has mode {mode:04o} and {KEY_LENGTH} bytes; its folder has {folder_mode:04o}"))
}

pub(super) fn cni_records(folder: Option<&Path>) -> Finding {
    let Some(folder) = folder else {
        return Finding::skipped(
            RECORDS,
            "--cni-results none: a pod is known when the API server shows its address, which may be after its first \
             request",
        );
    };
    let shown = folder.display();
    match newest(folder) {
        Ok((0, _)) => Finding::warning(
            RECORDS,
            format!("{shown} holds no record"),
            "right on a node without pods on a pod network; otherwise find where the container runtime keeps its CNI \
             cache, and give --cni-results",
        ),
        Ok((count, written)) => {
            let age = UnixTime::now().since(UnixTime(written)).as_secs();
            Finding::ok(RECORDS, format!("{shown} holds {count}, the newest {age} s old"))
        }
        Err(error) => Finding::warning(
            RECORDS,
            format!("{shown}: {error}: first requests of new pods may wait for the API server to show their address"),
            "mount the node's /var/lib/cni there, read-only (daemonset/base/daemonset.yaml), and run as root: the \
             records are root's own",
        ),
    }
}

/// How many records of pods' addresses there are, and when the newest was written.
fn newest(folder: &Path) -> io::Result<(usize, u64)> {
    let (mut count, mut newest) = (0, 0);
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // Every sandbox has one of its loopback interface beside it.
        if entry.file_name().to_string_lossy().ends_with("-lo") {
            continue;
        }
        // Readable, or of no use.
        if let Ok(metadata) = fs::File::open(entry.path()).and_then(|file| file.metadata())
            && metadata.is_file()
        {
            count += 1;
            newest = newest.max(u64::try_from(metadata.mtime()).unwrap_or(0));
        }
    }
    Ok((count, newest))
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn a_key_that_others_may_read_or_replace_fails() {
        let folder = std::env::temp_dir().join(format!("kirsa-doctor-{}", std::process::id()));
        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(state_dir(&folder).verdict, Verdict::Warning, "missing");
        fs::create_dir(&folder).unwrap();
        let key = folder.join(KEY_FILE);
        assert_eq!(state_dir(&folder).verdict, Verdict::Warning, "no key yet");
        fs::write(&key, [7; KEY_LENGTH]).unwrap();
        for (of_folder, of_key, verdict) in [
            (0o700, 0o600, Verdict::Ok),
            (0o755, 0o600, Verdict::Ok),
            (0o777, 0o600, Verdict::Failed),
            (0o700, 0o640, Verdict::Failed),
        ] {
            chmod(&folder, of_folder);
            chmod(&key, of_key);
            assert_eq!(state_dir(&folder).verdict, verdict, "{of_folder:o} {of_key:o}");
        }
        chmod(&key, 0o600);
        fs::write(&key, [7; KEY_LENGTH - 1]).unwrap();
        assert!(state_dir(&folder).detail.ends_with("has 31 bytes, not 32"));
        fs::remove_dir_all(folder).unwrap();
    }
}
