#!/usr/bin/env bash
# Prints the path of a Go toolchain that is new enough for every go.mod here, or fails with a message.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wanted=$(sed -n 's/^go //p' "$here"/go.mod "$here"/*/go.mod | sort -V | tail -n1)
for go in "$(command -v go || true)" /usr/local/go/bin/go /usr/lib/go/bin/go "$here/../../target/go/bin/go"; do
  [ -x "$go" ] || continue
  # `local`: an older Go must print its own version, not fetch a newer one.
  version=$(GOTOOLCHAIN=local "$go" env GOVERSION 2>/dev/null) || continue
  if [ "$(printf '%s\n' "$wanted" "${version#go}" | sort -V | head -n1)" = "$wanted" ]; then
    echo "$go"
    exit 0
  fi
done
echo "no Go $wanted or newer here: tests/setup.sh gets one" >&2
exit 1
