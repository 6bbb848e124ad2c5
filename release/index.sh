#!/usr/bin/env bash
# Make an OCI layout's images, one for each architecture, one image index with the version as its only name; prints the
# digest of the index.
#   index.sh LAYOUT
set -euo pipefail
. "$(dirname "$0")/common.sh"
layout=${1:?usage: index.sh LAYOUT}
need jq jq
blobs=$layout/blobs/sha256

platforms() { # descriptors of the images, with what their configurations say that they run on
  local descriptor manifest config
  jq -c '.manifests[] | {mediaType, digest, size}' "$layout/index.json" | while read -r descriptor; do
    manifest=$(jq -r .digest <<<"$descriptor")
    config=$(jq -r .config.digest "$blobs/${manifest#sha256:}")
    jq -c --argjson image "$descriptor" '$image + {platform: {architecture, os}}' "$blobs/${config#sha256:}"
  done
}

index=$(platforms | jq -cs '{schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json", manifests: sort_by(.platform.architecture)}')
[ "$(jq '.manifests | length' <<<"$index")" -gt 0 ] || die "no image in $layout"
digest=$(printf %s "$index" | sha256sum | cut -d' ' -f1)
printf %s "$index" >"$blobs/$digest"
jq -n --arg digest "sha256:$digest" --arg version "$version" --argjson size ${#index} '{schemaVersion: 2, manifests: [{
  mediaType: "application/vnd.oci.image.index.v1+json", $digest, $size,
  annotations: {"org.opencontainers.image.ref.name": $version}}]}' >"$layout/index.json"
echo "sha256:$digest"
