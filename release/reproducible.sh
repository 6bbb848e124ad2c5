#!/usr/bin/env bash
# Build the committed tree twice, in directories of different names, and compare binaries and digests. Takes as long as
# two builds.
#   PROFILE=, ARCHS=       as in build.sh
set -euo pipefail
. "$(dirname "$0")/common.sh"
work=$(mktemp -d "$repo/target/reproducible.XXXXXX"); trap 'rm -rf "$work"' EXIT
SOURCE_DATE_EPOCH=$(git -C "$repo" log -1 --format=%ct)
REVISION=$(git -C "$repo" rev-parse HEAD)
export SOURCE_DATE_EPOCH REVISION
digests=()
for tree in "$work/one" "$work/another/directory"; do
  mkdir -p "$tree/target"
  git -C "$repo" archive "$REVISION" | tar -x -C "$tree"
  # Pinned: downloaded once.
  for tool in debian zig; do [ ! -d "$repo/target/$tool" ] || ln -s "$repo/target/$tool" "$tree/target/$tool"; done
  digests+=("$("$tree/release/build.sh")")
  rm -rf "$tree/target/dist-build"
done
for binary in "$work"/one/target/dist/kirsa-linux-*; do
  cmp "$binary" "$work/another/directory/target/dist/$(basename "$binary")" || die "$(basename "$binary") depends on where it is built"
done
[ "${digests[0]}" = "${digests[1]}" ] || die "the image depends on where or when it is built: ${digests[*]}"
say "both builds are ${digests[0]}"
