//! What `make release` refuses before it builds anything, and the pins of the image's Debian packages. The rest of it is
//! the scenario `published` of `make e2e`.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const FILES: [&str; 10] = [
    "Cargo.toml",
    "CHANGELOG.md",
    "release/common.sh",
    "release/build.sh",
    "release/release.sh",
    "daemonset/base/kustomization.yaml",
    "daemonset/uninstall/kustomization.yaml",
    "daemonset/chart/Chart.yaml",
    "docs/install.md",
    "docs/migrate.md",
];
const REGISTRY: &str = "registry.example.com/path";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A committed tree with the files that a release looks at first, and nothing to build.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Self {
        let tree = Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
        fs::remove_dir_all(&tree.0).ok();
        for file in FILES {
            let copy = tree.0.join(file);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(root().join(file), copy).unwrap();
        }
        tree.git(&["init", "-q"]);
        tree.commit();
        tree
    }

    fn git(&self, arguments: &[&str]) {
        let author = ["-c", "user.name=test", "-c", "user.email=test@example.com"];
        let status = Command::new("git").current_dir(&self.0).args(author).args(arguments).status().unwrap();
        assert!(status.success(), "git {arguments:?}");
    }

    fn commit(&self) {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "-m", "tree"]);
    }

    fn replace(&self, file: &str, from: &str, to: &str) {
        let path = self.0.join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        fs::write(path, text.replace(from, to)).unwrap();
        self.commit();
    }

    fn release(&self, registry: Option<&str>) -> String {
        let mut command = Command::new(self.0.join("release/release.sh"));
        command.env_remove("REGISTRY").envs(registry.map(|registry| ("REGISTRY", registry)));
        let Output { status, stdout, stderr } = command.output().unwrap();
        assert!(!status.success() && stdout.is_empty(), "it cannot be released: there is nothing to build");
        String::from_utf8(stderr).unwrap()
    }
}

#[test]
fn a_release_needs_a_registry() {
    let tree = Tree::new("registry");
    for unset in [None, Some("")] {
        let error = tree.release(unset);
        assert!(error.contains("REGISTRY is not set"), "{error}");
    }
    for wrong in
        ["https://registry.example.com/path", "registry.example.com", "registry.example.com/Path", "r/x:1", "r/"]
    {
        let error = tree.release(Some(wrong));
        assert!(error.contains(&format!("REGISTRY={wrong} must be HOST[:PORT]/PATH")), "{error}");
    }
}

#[test]
fn a_release_needs_a_clean_tree() {
    let tree = Tree::new("clean");
    fs::write(tree.0.join("left-over"), "").unwrap();
    let error = tree.release(Some(REGISTRY));
    assert!(error.contains("not committed") && error.contains("?? left-over"), "{error}");
}

#[test]
fn a_release_has_one_version_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    let differ = [
        ("daemonset/base/kustomization.yaml", format!("newTag: {version}")),
        ("daemonset/uninstall/kustomization.yaml", format!("newTag: {version}")),
        ("daemonset/chart/Chart.yaml", format!("\nversion: {version}")),
        ("daemonset/chart/Chart.yaml", format!("appVersion: {version}")),
        ("docs/install.md", format!("newTag: {version}")),
        ("docs/migrate.md", format!("newTag: {version}")),
        ("CHANGELOG.md", format!("## [{version}]")),
    ];
    for (file, text) in differ {
        let tree = Tree::new("version");
        tree.replace(file, &text, &text.replace(version, "9.9.9"));
        let error = tree.release(Some(REGISTRY));
        assert!(error.contains(file) && error.contains(version), "{file}: {error}");
    }
    // Nothing is wrong with it as it is: it goes on to what this tree does not have.
    let error = Tree::new("version").release(Some(REGISTRY));
    assert!(error.contains("tests/setup.sh"), "{error}");
}

/// The binary of an earlier build is still there.
#[test]
fn a_failed_build_makes_no_image() {
    let tree = Tree::new("failed");
    let stale =
        tree.0.join("target/dist-build").join(format!("{}-unknown-linux-musl/release/kirsa", std::env::consts::ARCH));
    fs::create_dir_all(stale.parent().unwrap()).unwrap();
    fs::write(stale, "of before").unwrap();
    let cargo = tree.0.join("bin/cargo");
    fs::create_dir_all(cargo.parent().unwrap()).unwrap();
    fs::write(&cargo, "#!/bin/sh\necho cannot compile >&2; exit 101\n").unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", cargo.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = Command::new(tree.0.join("release/build.sh")).env("PATH", path).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("cannot compile"), "{error}");
    assert!(!error.contains("rootfs"), "an image was begun: {error}");
}

#[test]
fn both_architectures_have_the_same_packages() {
    let lock = fs::read_to_string(root().join("release/packages.lock")).unwrap();
    let mut packages = BTreeMap::<&str, Vec<&str>>::new();
    for line in lock.lines().filter(|line| !line.starts_with('#')) {
        let [arch, package, _version, sum] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        assert!(sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()), "{line}");
        packages.entry(arch).or_default().push(package);
    }
    assert_eq!(packages.keys().copied().collect::<Vec<_>>(), ["amd64", "arm64"]);
    assert_eq!(packages["amd64"], packages["arm64"]);
}
