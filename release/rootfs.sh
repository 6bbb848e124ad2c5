#!/usr/bin/env bash
# Lay out the image's files: kirsa, and from the Debian packages of packages.lock nft, iptables, the libraries that they
# load, CA certificates and licenses. Nothing of the packages is executed, so any machine can do it for any architecture.
#   rootfs.sh ARCH KIRSA DIR      DIR must not exist
set -euo pipefail
. "$(dirname "$0")/common.sh"
[ $# = 3 ] || die "usage: rootfs.sh ARCH KIRSA DIR"
arch=$1 kirsa=$2 root=$3
libraries=usr/lib/$(machine_of "$arch")-linux-gnu
need readelf binutils
is_static "$kirsa" || die "$kirsa is not a static binary"
[ ! -e "$root" ] || die "$root exists already"

# The programs, and the plugins that iptables opens by name: DNAT and its matches, the mark of kirsa's own check, the
# comments that name the rules.
programs='usr/sbin/nft usr/sbin/xtables-nft-multi usr/sbin/xtables-legacy-multi'
plugins='libxt_DNAT libxt_NAT libxt_addrtype libxt_comment libxt_conntrack libxt_mark libxt_MARK libxt_socket
  libxt_standard libxt_tcp libipt_REJECT libip6t_REJECT'

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
unpacked=$work/unpacked
declare -A owner debs used

# All packages into one tree. Debian's lib and lib64 are links into usr.
in_usr() { sed -E 's,^\.?/,,; s,^(lib|lib64|bin|sbin)/,usr/\1/,'; }
unpack() {
  local package deb file part
  mkdir -p "$unpacked"/usr/{lib,lib64,bin,sbin}
  for part in lib lib64 bin sbin; do ln -s "usr/$part" "$unpacked/$part"; done
  "$repo/release/debian.sh" fetch "$arch" >"$work/packages"
  while read -r package deb; do
    debs[$package]=$deb
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$unpacked"
    while read -r file; do owner[$file]=$package; done < <(dpkg-deb --fsys-tarfile "$deb" | tar -t | in_usr | grep .)
  done <"$work/packages"
}

# Follows links within the unpacked tree, where absolute ones are relative to its top.
resolve() { # path
  local path=$1 target
  while [ -L "$unpacked/$path" ]; do
    target=$(readlink "$unpacked/$path")
    case $target in /*) ;; *) target=$(realpath -ms "/$(dirname "$path")/$target") ;; esac
    path=$(in_usr <<<"$target")
  done
  [ -f "$unpacked/$path" ] || die "$1 is in none of the packages of release/packages.lock: add the one that has it"
  echo "$path"
}

# Copies a file to the same path in the image; a link becomes a file.
take() { # path
  local file; file=$(resolve "$1")
  used[${owner[$file]}]=1
  [ ! -e "$root/$1" ] || return 0
  install -D -m "$([ -x "$unpacked/$file" ] && echo 755 || echo 644)" "$unpacked/$file" "$root/$1"
}

# Copies a program or plugin with its loader and every library that it needs, directly or through another library.
take_elf() { # path
  [ ! -e "$root/$1" ] || return 0
  take "$1"
  local file=$unpacked/$(resolve "$1") loader name
  loader=$(readelf -lW "$file" | sed -n 's/.*program interpreter: \/\(.*\)\]/\1/p' | in_usr)
  [ -z "$loader" ] || { take "$loader"; loaded=$(basename "$loader"); }
  for name in $(readelf -dW "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
    # The loader is in memory already when a library asks for it.
    [ "$name" = "$loaded" ] || take_elf "$libraries/$name"
  done
}

unpack
mkdir -p "$root"/{etc/ssl/certs,usr/bin,usr/sbin,usr/lib,usr/lib64,var/lib/dpkg/status.d,proc,dev,sys,run,tmp}
for link in lib lib64; do ln -s "usr/$link" "$root/$link"; done
install -m 755 "$kirsa" "$root/usr/bin/kirsa"
install -D -m 644 "$repo/LICENSE" "$root/usr/share/doc/kirsa/copyright"

loaded=
for program in $programs; do take_elf "$program"; done
for plugin in $plugins; do take_elf "$libraries/xtables/$plugin.so"; done
# Links as Debian's alternatives make them, but to the legacy kind: where nf_tables is there, nft is used.
for family in iptables ip6tables; do for verb in '' -restore -save; do
  for kind in nft legacy; do ln -s "xtables-$kind-multi" "$root/usr/sbin/$family-$kind$verb"; done
  ln -s xtables-legacy-multi "$root/usr/sbin/$family$verb"
done; done

# As update-ca-certificates does it.
for certificate in "$unpacked"/usr/share/ca-certificates/mozilla/*.crt; do
  cat "$certificate"; echo
done | grep -v '^$' >"$root/etc/ssl/certs/ca-certificates.crt"
used[ca-certificates]=1
echo 'root:x:0:0:root:/:/nologin' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
take usr/lib/os-release
ln -s ../usr/lib/os-release "$root/etc/os-release"

# Whose files these are: for vulnerability scanners, and for the licenses that ask to be passed on.
for package in "${!debs[@]}"; do
  [ -n "${used[$package]:-}" ] || die "no file of $package is needed: remove it from release/packages.lock"
  dpkg-deb -f "${debs[$package]}" | sed '/^Package:/a Status: install ok installed' >"$root/var/lib/dpkg/status.d/$package"
  take "usr/share/doc/$package/copyright"
done
find "$root" -type d -exec chmod 755 {} +
