#!/usr/bin/env bash
# Build and publish the version that is committed. `make release` calls it.
#   REGISTRY=HOST/PATH     required
#   ARCHS=, PROFILE=, PLAIN_HTTP=   as in build.sh and publish.sh
set -euo pipefail
. "$(dirname "$0")/common.sh"
check_registry
changes=$(git -C "$repo" status --porcelain)
[ -z "$changes" ] || die "the tree has changes that are not committed, and a release is a commit:
$changes"
for file in daemonset/base/kustomization.yaml daemonset/uninstall/kustomization.yaml docs/install.md docs/migrate.md; do
  grep -q "^    newTag: $version\$" "$repo/$file" || die "Cargo.toml has version $version and $file another one"
done
grep -q "^version: $version\$" "$repo/daemonset/chart/Chart.yaml" && grep -q "^appVersion: $version\$" "$repo/daemonset/chart/Chart.yaml" ||
  die "Cargo.toml has version $version and daemonset/chart/Chart.yaml another one"
grep -qE "^## \[${version//./\\.}\] - [0-9]{4}-[0-9]{2}-[0-9]{2}\$" "$repo/CHANGELOG.md" ||
  die "CHANGELOG.md has no heading \"## [$version] - YYYY-MM-DD\""
"$repo/tests/setup.sh" release
# Before the build, which takes minutes.
"$repo/release/publish.sh" check
"$repo/release/build.sh" >&2
"$repo/release/publish.sh"
