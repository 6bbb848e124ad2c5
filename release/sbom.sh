#!/usr/bin/env bash
# Print the software bill of materials of an image, as CycloneDX 1.6 JSON: the crates that are compiled into kirsa, with
# the checksums of Cargo.lock, and the Debian packages whose files are in the image.
#   sbom.sh ARCH
set -euo pipefail
. "$(dirname "$0")/common.sh"
arch=${1:?usage: sbom.sh ARCH}
need jq jq

# Lines "NAME VERSION SHA256" of Cargo.lock; what has no checksum is of this repository.
checksums() {
  awk -F'"' '/^name = /{ name = $2 } /^version = /{ version = $2 } /^checksum = /{ print name, version, $2 }' "$repo/Cargo.lock"
}

# Without what only tests, build scripts and other platforms need.
crates() {
  local line name version license
  declare -A sums
  while read -r name version line; do sums[$name@$version]=$line; done < <(checksums)
  (cd "$repo" && cargo tree --quiet --locked --package kirsa --edges normal,no-proc-macro --target "$(triple_of "$arch")" --prefix none --format '{p}|{l}') |
    sed -E 's/^([^ ]+) v([^ |]+)[^|]*\|/\1|\2|/; s/ \(\*\)$//' | sort -u |
    while IFS='|' read -r name version license; do
      [ -n "${sums[$name@$version]:-}" ] || continue
      jq -nc --arg name "$name" --arg version "$version" --arg license "$license" --arg sum "${sums[$name@$version]}" '
        ("pkg:cargo/\($name)@\($version)") as $purl | {type: "library", "bom-ref": $purl, $name, $version, $purl,
          hashes: [{alg: "SHA-256", content: $sum}]}
          + if $license == "" then {} else {licenses: [{expression: ($license | gsub("/"; " OR "))}]} end'
    done
}

debian() {
  local package deb
  while read -r package deb; do
    jq -nc --arg name "$package" --arg version "$(dpkg-deb -f "$deb" Version)" --arg arch "$(dpkg-deb -f "$deb" Architecture)" \
      --arg sum "$(sha256sum <"$deb" | cut -d' ' -f1)" '
        ("pkg:deb/debian/\($name)@\($version | @uri)?arch=\($arch)&distro=debian-12") as $purl | {type: "library", "bom-ref": $purl,
          $name, $version, $purl, hashes: [{alg: "SHA-256", content: $sum}]}'
  done
}

packages=$(mktemp); trap 'rm -f "$packages"' EXIT
"$repo/release/debian.sh" fetch "$arch" | debian >"$packages"
crates | jq -s --slurpfile packages "$packages" --arg version "$version" --arg arch "$arch" '{
  "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", bomFormat: "CycloneDX", specVersion: "1.6", version: 1,
  metadata: {component: {type: "container", "bom-ref": "kirsa", name: "kirsa", $version,
    licenses: [{license: {id: "Apache-2.0"}}], properties: [{name: "kirsa:architecture", value: $arch}]}},
  components: (. + $packages)}'
