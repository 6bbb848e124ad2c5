# Shared by the scripts that build and publish images; sourced.
# A command that fails in $(...) ends the script: a failed build must not leave the binary of the one before.
shopt -s inherit_errexit
umask 022
export LC_ALL=C
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=$(sed -n '/^\[package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml")

say() { echo "$(basename "$0" .sh): $*" >&2; }
die() { say "$*"; exit 1; }
need() { # command package
  command -v "$1" >/dev/null || die "$1 is missing: apt-get install $2"
}

# Dies unless REGISTRY names a place to publish to.
check_registry() {
  [ -n "${REGISTRY:-}" ] || die "REGISTRY is not set, and the project has no registry of its own: make release REGISTRY=registry.example.com/path"
  local part='[a-z0-9]+([._-]+[a-z0-9]+)*'
  [[ $REGISTRY =~ ^[A-Za-z0-9.-]+(:[0-9]+)?(/$part)+$ ]] ||
    die "REGISTRY=$REGISTRY must be HOST[:PORT]/PATH in lower case, without a scheme or a tag: registry.example.com/path"
}

# Architectures by their names in images and in Debian: amd64, arm64.
machine_of() {
  case $1 in
    amd64) echo x86_64 ;;
    arm64) echo aarch64 ;;
    *) die "no such architecture: $1 (amd64, arm64)" ;;
  esac
}
triple_of() { echo "$(machine_of "$1")-unknown-linux-musl"; }
native_arch() {
  case $(uname -m) in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) die "the image is for x86_64 and aarch64, and this machine is $(uname -m)" ;;
  esac
}

is_static() { readelf -lW "$1" >/dev/null 2>&1 && ! readelf -lW "$1" | grep -q INTERP; }

# A store of its own on plain directories works in containers and leaves nothing behind.
buildah_in() { # directory command...
  local dir=$1; shift
  buildah --root "$dir/store" --runroot "$dir/storerun" --storage-driver vfs "$@"
}

# Builds the Dockerfile from CONTEXT/rootfs and writes the image to DESTINATION, in buildah's notation (oci:DIR:TAG).
# The same context, buildah and SOURCE_DATE_EPOCH give the same digest.
build_image() { # arch context destination
  local arch=$1 context=$2 destination=$3 epoch=${SOURCE_DATE_EPOCH:-0}
  need buildah buildah
  find "$context/rootfs" -exec touch -h -d "@$epoch" {} +
  buildah_in "$context" build -q --isolation chroot --arch "$arch" --timestamp "$epoch" --format oci \
    --build-arg "VERSION=$version" --build-arg "REVISION=${REVISION:-}" -f "$repo/Dockerfile" -t "kirsa:$arch" "$context" >/dev/null
  buildah_in "$context" push -q --compression-format zstd --compression-level 19 "kirsa:$arch" "$destination" >/dev/null
  rm -rf "$context/store" "$context/storerun"
}
