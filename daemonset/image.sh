#!/usr/bin/env bash
# Build kirsa's image for this machine's architecture with buildah or docker into target/image/kirsa.tar and print its
# size. For trying and testing; `make release` builds what is published.
#   IMAGE=localhost/kirsa:0.1.0   the name in the archive
#   KIRSA_BINARY=PATH             a static binary that exists already, instead of building one
#   PROFILE=release|quick         cargo's; quick compiles in a fraction of the time and is for trying, not for shipping
#   ENGINE=buildah|docker         default: the first that is there
#   LIMIT=10000000                bytes, compressed; more is an error
set -euo pipefail
. "$(dirname "$0")/../release/common.sh"
work=$repo/target/image
arch=$(native_arch)
image=${IMAGE:-localhost/kirsa:$version}
limit=${LIMIT:-10000000}
profile=${PROFILE:-release}

binary() {
  if [ -n "${KIRSA_BINARY:-}" ]; then realpath "$KIRSA_BINARY"; return; fi
  local triple; triple=$(triple_of "$arch")
  # aws-lc is C: it needs musl's headers as well.
  need musl-gcc musl-tools
  [ -d "$(cd "$repo" && rustc --print sysroot)/lib/rustlib/$triple" ] || die "Rust's $triple is missing: rustup target add $triple"
  (cd "$repo" && env "CC_${triple//-/_}=musl-gcc" cargo build --profile "$profile" --locked --target "$triple" --bin kirsa >&2)
  echo "$repo/target/$triple/$profile/kirsa"
}

# One compressed layer per COPY; both archives hold an OCI layout, whose blobs are what a registry would store.
build() {
  local engine=${ENGINE:-}
  [ -n "$engine" ] || engine=$(command -v buildah || command -v docker) || die "needs buildah or docker"
  case $(basename "$engine") in
    buildah) build_image "$arch" "$work" "oci-archive:$work/kirsa.tar:$image" ;;
    docker)
      docker build -q --build-arg "VERSION=$version" -f "$repo/Dockerfile" -t "$image" "$work" >/dev/null
      docker save "$image" -o "$work/kirsa.tar" ;;
    *) die "ENGINE=$engine: must be buildah or docker" ;;
  esac
}

size() { # prints the bytes of the archive's blobs, gzip-compressed where the engine did not compress them
  local dir; dir=$(mktemp -d)
  tar -xf "$work/kirsa.tar" -C "$dir"
  local total=0 blob
  while read -r blob; do
    if gzip -t "$blob" 2>/dev/null; then total=$((total + $(stat -c %s "$blob"))); else total=$((total + $(gzip -c "$blob" | wc -c))); fi
  done < <(find "$dir" -type f -path '*blobs/sha256/*')
  rm -rf "$dir"
  echo "$total"
}

kirsa=$(binary)
rm -rf "$work"; mkdir -p "$work"
"$repo/release/rootfs.sh" "$arch" "$kirsa" "$work/rootfs"
build
bytes=$(size)
say "$image in ${work#"$PWD"/}/kirsa.tar"
say "$(awk -v b="$bytes" 'BEGIN { printf "%.1f", b / 1e6 }') MB compressed (kirsa $(awk -v b="$(gzip -c "$kirsa" | wc -c)" 'BEGIN { printf "%.1f", b / 1e6 }') MB of it), limit $(awk -v b="$limit" 'BEGIN { printf "%.1f", b / 1e6 }') MB"
[ "$bytes" -le "$limit" ] || die "too large"
