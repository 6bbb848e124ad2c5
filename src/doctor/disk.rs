//! Checks the state directory and the CNI records on the node's disk.

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
const MOUNT: &str =
    "mount a folder of the node there (hostPath, see daemonset/base/daemonset.yaml), or change --state-dir";

pub(super) fn state_dir(folder: &Path) -> Finding {
    let shown = folder.display();
    let folder_mode = match fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => metadata.permissions().mode() & 0o7777,
        Ok(_) => return Finding::failed(STATE, format!("{shown} is not a directory"), MOUNT),
        Err(error) => {
            let detail = format!("{shown}: {error}: IMDS tokens become invalid when the agent restarts");
            return Finding::warning(STATE, detail, MOUNT);
        }
    };
    // Read permission for others is harmless: the kubelet creates the directory with mode 0755.
    if folder_mode & 0o022 != 0 {
        let detail = format!("{shown} has mode {folder_mode:04o}: other users can replace the key of IMDS tokens");
        return Finding::failed(STATE, detail, format!("chmod 700 {shown}"));
    }
    let key = folder.join(KEY_FILE);
    let shown = key.display();
    let (mode, length) = match fs::metadata(&key) {
        Ok(metadata) => (metadata.permissions().mode() & 0o7777, metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let fix = "start the agent, which creates the key; if it runs, its log says why it could not write the key";
            return Finding::warning(STATE, format!("{shown} does not exist yet"), fix);
        }
        Err(error) => return Finding::failed(STATE, format!("{shown}: {error}"), MOUNT),
    };
    if mode & 0o077 != 0 {
        let fix = format!("remove {shown} and restart the agent, which creates a new key");
        return Finding::failed(STATE, format!("{shown} has mode {mode:04o}: other users can read or change it"), fix);
    }
    if length != KEY_LENGTH as u64 {
        let fix = "restart the agent, which replaces a damaged key; SDKs then request new IMDS tokens";
        return Finding::failed(STATE, format!("{shown} has {length} bytes, not {KEY_LENGTH}"), fix);
    }
    Finding::ok(
        STATE,
        format!("{shown} has mode {mode:04o} and {KEY_LENGTH} bytes; its directory has mode {folder_mode:04o}"),
    )
}

pub(super) fn cni_records(folder: Option<&Path>) -> Finding {
    let Some(folder) = folder else {
        return Finding::skipped(
            RECORDS,
            "--cni-results none: the agent knows a pod once the API server shows its address, possibly after its first \
             request",
        );
    };
    let shown = folder.display();
    match newest(folder) {
        Ok((0, _)) => Finding::warning(
            RECORDS,
            format!("{shown} contains no record"),
            "this is normal on a node without pods on a pod network; otherwise find where the container runtime keeps \
             its CNI cache and set --cni-results",
        ),
        Ok((count, written)) => {
            let age = UnixTime::now().since(written).as_secs();
            Finding::ok(RECORDS, format!("{shown} contains {count} records, the newest {age} s old"))
        }
        Err(error) => Finding::warning(
            RECORDS,
            format!("{shown}: {error}: first requests of new pods may wait until the API server shows their address"),
            "mount the node's /var/lib/cni there, read-only (daemonset/base/daemonset.yaml), and run as root, which \
             owns the records",
        ),
    }
}

/// Returns the number of readable records and the time when the newest was written.
fn newest(folder: &Path) -> io::Result<(usize, UnixTime)> {
    let (mut count, mut newest) = (0, 0);
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // Every sandbox also has a record of its loopback interface.
        if entry.file_name().to_string_lossy().ends_with("-lo") {
            continue;
        }
        // A record that cannot be opened is useless to the agent too.
        if let Ok(metadata) = fs::File::open(entry.path()).and_then(|file| file.metadata())
            && metadata.is_file()
        {
            count += 1;
            newest = newest.max(u64::try_from(metadata.mtime()).unwrap_or(0));
        }
    }
    Ok((count, UnixTime(newest)))
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn key_that_other_users_can_access_fails() {
        let folder = std::env::temp_dir().join(format!("kirsa-doctor-{}", std::process::id()));
        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(state_dir(&folder).verdict, Verdict::Warning, "missing");
        fs::create_dir(&folder).unwrap();
        let key = folder.join(KEY_FILE);
        assert_eq!(state_dir(&folder).verdict, Verdict::Warning, "no key yet");
        fs::write(&key, [7; KEY_LENGTH]).unwrap();
        for (folder_mode, key_mode, verdict) in [
            (0o700, 0o600, Verdict::Ok),
            (0o755, 0o600, Verdict::Ok),
            (0o777, 0o600, Verdict::Failed),
            (0o700, 0o640, Verdict::Failed),
        ] {
            chmod(&folder, folder_mode);
            chmod(&key, key_mode);
            assert_eq!(state_dir(&folder).verdict, verdict, "{folder_mode:o} {key_mode:o}");
        }
        chmod(&key, 0o600);
        fs::write(&key, [7; KEY_LENGTH - 1]).unwrap();
        assert!(state_dir(&folder).detail.ends_with("has 31 bytes, not 32"));
        fs::remove_dir_all(folder).unwrap();
    }
}
