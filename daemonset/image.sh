#!/usr/bin/env bash
# Build kirsa's image (Dockerfile) with buildah or docker into target/image/kirsa.tar and print its size.
#   IMAGE=localhost/kirsa:0.1.0   name in the archive
#   KIRSA_BINARY=PATH             an existing static binary, instead of building one
#   PROFILE=release|quick         cargo profile; quick compiles in a fraction of the time, for tests only
#   ENGINE=buildah|docker         default: the first that is installed
#   LIMIT=10000000                maximum compressed size in bytes
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$repo/target/image root=$repo/target/image/rootfs
version=$(sed -n '/^\[package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml")
image=${IMAGE:-localhost/kirsa:$version}
limit=${LIMIT:-10000000}
profile=${PROFILE:-release}
say() { echo "image: $*" >&2; }
die() { say "$*"; exit 1; }

# Plugins that the rules need: DNAT and its matches, the mark of the self-test, the comments that identify the rules.
plugins='libxt_DNAT libxt_NAT libxt_addrtype libxt_comment libxt_conntrack libxt_mark libxt_MARK libxt_socket
  libxt_standard libxt_tcp libipt_REJECT libip6t_REJECT'

binary() {
  if [ -n "${KIRSA_BINARY:-}" ]; then realpath "$KIRSA_BINARY"; return; fi
  local triple; triple=$(uname -m)-unknown-linux-musl
  # aws-lc is C: it needs musl's headers as well (Debian: musl-tools).
  command -v musl-gcc >/dev/null || die "musl-gcc is missing: apt-get install musl-tools"
  [ -d "$(cd "$repo" && rustc --print sysroot)/lib/rustlib/$triple" ] || die "Rust's $triple is missing: rustup target add $triple"
  (cd "$repo" && env "CC_${triple//-/_}=musl-gcc" cargo build --profile "$profile" --locked --target "$triple" --bin kirsa >&2)
  echo "$repo/target/$triple/$profile/kirsa"
}

# Copies a file to the same path in the image, once; links become files, directories are merged into /usr as Debian does.
take() { # file [name]
  local at=${2:-$1}
  case $at in /lib/* | /lib64/*) at=/usr$at ;; esac
  [ -e "$root$at" ] || install -D -m "$(stat -L -c %a "$1")" "$1" "$root$at"
  echo "$1" >>"$work/taken"
}
libraries() { ldd "$1" | sed -nE 's/^\s*(\S+ => )?(\/\S+) \(0x.*/\2/p'; }
program() { # file; also takes every library that it loads
  take "$1"
  local lib; for lib in $(libraries "$1"); do take "$lib"; done
}

stage() {
  rm -rf "$work"; mkdir -p "$root"/{etc/ssl/certs,usr/bin,usr/sbin,usr/lib,usr/lib64,var/lib/dpkg/status.d,proc,dev,sys,run,tmp}
  local link; for link in lib lib64; do ln -s "usr/$link" "$root/$link"; done
  install -m 755 "$1" "$root/usr/bin/kirsa"

  program "$(command -v nft || echo /usr/sbin/nft)"
  program /usr/sbin/xtables-nft-multi
  program /usr/sbin/xtables-legacy-multi
  # The tools dlopen plugins by name, so ldd cannot find them.
  local dir plugin; dir=$(dirname "$(dpkg -L iptables | grep -m1 '/xtables/libxt_tcp.so$')")
  for plugin in $plugins; do program "$dir/$plugin.so"; done
  # Same links as Debian's alternatives, but to legacy iptables: where nf_tables exists, the agent uses nft.
  local family verb kind
  for family in iptables ip6tables; do for verb in '' -restore -save; do
    for kind in nft legacy; do ln -s "xtables-$kind-multi" "$root/usr/sbin/$family-$kind$verb"; done
    ln -s xtables-legacy-multi "$root/usr/sbin/$family$verb"
  done; done

  take /etc/ssl/certs/ca-certificates.crt
  echo 'root:x:0:0:root:/:/nologin' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  take /etc/os-release

  # Records the packages of these files: for scanners, and for licenses that must be distributed.
  local file package
  while read -r file; do dpkg -S "$(readlink -f "$file")" "$file" "${file#/usr}" 2>/dev/null || true; done \
    < <(sort -u "$work/taken") | sed 's/: .*//' | sort -u >"$work/packages"
  echo ca-certificates >>"$work/packages"
  while read -r package; do
    dpkg-query -s "$package" >"$root/var/lib/dpkg/status.d/${package%%:*}"
    take "/usr/share/doc/${package%%:*}/copyright"
  done <"$work/packages"
  find "$root" -type d -exec chmod 755 {} +
}

# Makes one compressed layer per COPY; both archives hold an OCI layout, whose blobs are what a registry would store.
build() {
  local engine=${ENGINE:-}
  [ -n "$engine" ] || engine=$(command -v buildah || command -v docker) || die "needs buildah or docker"
  case $(basename "$engine") in
    buildah)
      # Uses its own store on plain directories, which works in containers and leaves nothing behind.
      local b="buildah --root $work/store --runroot $work/storerun --storage-driver vfs"
      $b build -q --isolation chroot --timestamp "${SOURCE_DATE_EPOCH:-0}" --build-arg "VERSION=$version" \
        -f "$repo/Dockerfile" -t "$image" "$work" >/dev/null
      $b push -q --compression-format zstd --compression-level 19 "$image" "oci-archive:$work/kirsa.tar:$image" >/dev/null
      rm -rf "$work/store" "$work/storerun" ;;
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
[[ $(ldd "$kirsa" 2>&1) =~ 'statically linked'|'not a dynamic executable' ]] || die "$kirsa is not a static binary"
stage "$kirsa"
build
bytes=$(size)
say "$image in ${work#"$PWD"/}/kirsa.tar"
say "$(awk -v b="$bytes" 'BEGIN { printf "%.1f", b / 1e6 }') MB compressed (kirsa $(awk -v b="$(gzip -c "$kirsa" | wc -c)" 'BEGIN { printf "%.1f", b / 1e6 }') MB of it), limit $(awk -v b="$limit" 'BEGIN { printf "%.1f", b / 1e6 }') MB"
[ "$bytes" -le "$limit" ] || die "too large"
