#!/usr/bin/env bash
# Build the release's binaries and images into target/dist (not target/release, which is cargo's): kirsa-linux-ARCH and
# its bill of materials for each architecture, and image/, an OCI layout whose only name, the version, is an image index. Two builds of a commit
# give the same digests, wherever the checkout is. Prints the digest of the index.
#   ARCHS="amd64"          architectures, separated by spaces; default: this machine's
#   DIST=DIR               instead of target/dist; an earlier build in it is removed
#   PROFILE=release|quick  cargo's
#   KIRSA_BINARY=PATH      a static binary that exists already, instead of building one; needs a single ARCHS
#   STRICT=0               take the present Debian packages where the mirror has lost the pinned ones
#   LIMIT=10000000         bytes of an image, compressed; more is an error
set -euo pipefail
. "$(dirname "$0")/common.sh"
dist=$(realpath -m "${DIST:-$repo/target/dist}")
profile=${PROFILE:-release}
limit=${LIMIT:-10000000}
read -ra archs <<<"${ARCHS:-$(native_arch)}"
[ -z "${KIRSA_BINARY:-}" ] || [ ${#archs[@]} = 1 ] || die "KIRSA_BINARY is one binary, and ARCHS are ${archs[*]}"
need jq jq
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$repo" log -1 --format=%ct)}
REVISION=${REVISION:-$(git -C "$repo" rev-parse HEAD)}
export SOURCE_DATE_EPOCH
export STRICT=${STRICT-1}

# Paths of this checkout, of cargo's home, of the build directory and of the toolchain stay out of the binary: panic messages and the C
# code's assertions would have them.
binary() { # arch
  if [ -n "${KIRSA_BINARY:-}" ]; then realpath "$KIRSA_BINARY"; return; fi
  local triple target=$repo/target/dist-build cargo_home sysroot std rust c
  triple=$(triple_of "$1")
  local -a compiler
  if [ "$1" = "$(native_arch)" ]; then
    need musl-gcc musl-tools
    compiler=("CC_${triple//-/_}=musl-gcc")
  else
    [ -x "$repo/target/zig/bin/python" ] || die "zig, the C compiler for $1, is missing: tests/setup.sh release installs it"
    # Rust brings the linker, and musl's start files and libc, for its own targets.
    compiler=("CC_${triple//-/_}=$repo/release/zig-cc.sh" "AR_${triple//-/_}=$repo/release/zig-ar.sh"
      "ZIG_TARGET=$(machine_of "$1")-linux-musl" "CARGO_TARGET_$(tr a-z- A-Z_ <<<"$triple")_LINKER=rust-lld")
  fi
  sysroot=$(cd "$repo" && rustc --print sysroot)
  [ -d "$sysroot/lib/rustlib/$triple" ] || die "Rust's $triple is missing: rustup target add $triple"
  cargo_home=$(realpath -m "${CARGO_HOME:-$HOME/.cargo}")
  # The standard library's paths are /rustc/COMMIT where the component rust-src is not installed.
  std=$sysroot/lib/rustlib/src/rust=/rustc/$(cd "$repo" && rustc -vV | sed -n 's/^commit-hash: //p')
  # The last prefix that matches wins, for Rust and C alike.
  rust=$(printf -- '--remap-path-prefix=%s\x1f' "$repo=/kirsa" "$target=/target" "$cargo_home=/cargo" "$std")
  c="-ffile-prefix-map=$cargo_home=/cargo -ffile-prefix-map=$target=/target -ffile-prefix-map=$repo=/kirsa"
  (cd "$repo" && env "${compiler[@]}" "CFLAGS_${triple//-/_}=$c" "CARGO_ENCODED_RUSTFLAGS=${rust%?}" \
    cargo build --profile "$profile" --locked --target "$triple" --target-dir "$target" --bin kirsa >&2)
  echo "$target/$triple/$profile/kirsa"
}

size() { # arch: bytes of the image in a registry
  local manifest
  manifest=$(jq -r --arg arch "$1" '.manifests[] | select(.annotations["org.opencontainers.image.ref.name"] == $arch).digest' "$dist/image/index.json")
  jq '[.config.size, .layers[].size] | add' "$dist/image/blobs/sha256/${manifest#sha256:}"
}

mkdir -p "$dist"
# Of an earlier build: nothing else, whatever DIST is.
rm -rf "$dist"/{image,work.*,kirsa-*,install.yaml,uninstall.yaml,digests,SHA256SUMS}
for arch in "${archs[@]}"; do
  kirsa=$(binary "$arch")
  work=$(mktemp -d "$dist/work.XXXXXX")
  "$repo/release/rootfs.sh" "$arch" "$kirsa" "$work/rootfs"
  install -m 755 "$kirsa" "$dist/kirsa-linux-$arch"
  "$repo/release/sbom.sh" "$arch" >"$dist/kirsa-linux-$arch.cdx.json"
  build_image "$arch" "$work" "oci:$dist/image:$arch"
  rm -rf "$work"
  bytes=$(size "$arch")
  say "$arch: $bytes bytes compressed, limit $limit"
  [ "$bytes" -le "$limit" ] || die "the image for $arch is too large"
done
"$repo/release/index.sh" "$dist/image"
