#!/usr/bin/env bash
# The Debian packages of the image, by the versions and checksums in packages.lock. They come from apt with sources of
# their own, are unpacked and never installed or run: what the build machine has installed does not matter.
#   debian.sh fetch ARCH    download what is not cached in target/debian; prints "PACKAGE FILE" for each package
#   debian.sh pin           write the present versions of the packages in packages.lock back to it, after a security update
#   STRICT=1                fail if the mirror no longer has a pinned version, instead of taking the present one
#   DEBIAN_MIRROR=, DEBIAN_SECURITY_MIRROR=   for example a date of https://snapshot.debian.org/archive/debian/
set -euo pipefail
. "$(dirname "$0")/common.sh"
lock=$repo/release/packages.lock
cache=$repo/target/debian
suite=bookworm
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

apt() { # arch command...
  local dir=$cache/apt-$1 arch=$1 tool=$2; shift 2
  "$tool" -q -o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$dir/lists" \
    -o "Dir::State::Status=$dir/status" -o "Dir::Cache=$dir/cache" -o "APT::Architecture=$arch" -o "APT::Architectures=$arch" \
    -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Check-Valid-Until=false \
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

# Checks the signatures of the suite's lists. Valid-Until is not enforced, for the snapshots: the lock has the checksums.
update() { # arch
  local dir=$cache/apt-$1 main=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
  local security=${DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}
  [ -r "$keyring" ] || die "$keyring is missing: apt-get install debian-archive-keyring"
  mkdir -p "$dir"/{lists,cache}/partial "$dir"/cache/archives/partial
  : >"$dir/status"
  cat >"$dir/sources.list" <<S
deb [signed-by=$keyring] $main $suite main
deb [signed-by=$keyring] $main $suite-updates main
deb [signed-by=$keyring] $security $suite-security main
S
  apt "$1" apt-get update >&2 || die "cannot read the package lists of $main and $security"
}

pinned() { # arch: lines "PACKAGE VERSION SHA256"
  awk -v arch="$1" '$1 == arch { print $2, $3, $4 }' "$lock"
}

# Downloads NAME or NAME=VERSION to the cache, under the checksum of the file; prints "PACKAGE SHA256" for each.
download() { # arch package...
  local arch=$1 into deb sum; shift
  into=$(mktemp -d "$cache/download.XXXXXX")
  if ! (cd "$into" && apt "$arch" apt-get download "$@") >&2; then rm -rf "$into"; return 1; fi
  for deb in "$into"/*.deb; do
    sum=$(sha256sum "$deb" | cut -d' ' -f1)
    echo "$(dpkg-deb -f "$deb" Package) $sum"
    mv "$deb" "$cache/$sum.deb"
  done
  rmdir "$into"
}

# The file of a pinned package, or the one that a build that is not strict takes instead.
cached() { # sha256
  local file=$cache/$1.deb
  [ -f "$file" ] || [ "${STRICT:-}" = 1 ] || file=$cache/$1.instead
  [ -f "$file" ] && echo "$file"
}

fetch() { # arch
  local arch=$1 package version sum file missing=()
  local -A pins
  while read -r package version sum; do
    cached "$sum" >/dev/null || { missing+=("$package=$version"); pins[$package]=$sum; }
  done < <(pinned "$arch")
  if [ ${#missing[@]} -gt 0 ]; then
    need apt-get apt
    update "$arch"
    if ! download "$arch" "${missing[@]}" >"$cache/downloaded.$$"; then
      [ "${STRICT:-}" != 1 ] || die "the mirror lacks a version that release/packages.lock pins (above). Take the present ones: release/debian.sh pin; or name a snapshot in DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR"
      say "taking the present versions instead of those that release/packages.lock pins: fine for a test, not for a release"
      download "$arch" "${missing[@]%%=*}" >"$cache/downloaded.$$" || die "cannot download ${missing[*]%%=*}"
    fi
    while read -r package sum; do
      [ "$sum" = "${pins[$package]}" ] || ln -sfn "$sum.deb" "$cache/${pins[$package]}.instead"
    done <"$cache/downloaded.$$"
    rm "$cache/downloaded.$$"
  fi
  while read -r package version sum; do
    file=$(cached "$sum") || die "$package $version for $arch is not the file that release/packages.lock has the checksum of"
    echo "$package $file"
  done < <(pinned "$arch")
}

pin() {
  local arch packages new
  packages=$(awk '!/^#/ && NF { print $2 }' "$lock" | sort -u)
  new=$(mktemp "$cache/lock.XXXXXX")
  grep '^#' "$lock" >"$new"
  for arch in amd64 arm64; do
    update "$arch"
    # shellcheck disable=SC2086
    apt "$arch" apt-cache show --no-all-versions $packages |
      awk -v arch="$arch" '/^Package:/ { p = $2 } /^Version:/ { v = $2 } /^SHA256:/ { print arch, p, v, $2 }' >>"$new" ||
      die "a package of release/packages.lock is not in $suite for $arch (above)"
  done
  chmod 644 "$new"; mv "$new" "$lock"
}

need dpkg-deb dpkg
mkdir -p "$cache"
case ${1:-} in
  fetch) fetch "${2:?usage: debian.sh fetch ARCH}" ;;
  pin) pin ;;
  *) die "usage: debian.sh fetch ARCH | pin" ;;
esac
