#!/usr/bin/env bash
# Get the AWS clients of the matrix, in pinned versions, from the registries of their languages, into target/clients.
# Nothing of the system is changed. What cannot be had leaves its reason in target/clients/NAME.skipped.
#   install.sh quick    those that every test run can afford
#   install.sh          all
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}/clients
mkdir -p "$target"
target=$(cd "$target" && pwd)
log=$target/install.log
: >"$log"

say() { echo "clients: $*" >&2; }

# install NAME VERSION COMMAND FILE...: runs `COMMAND FOLDER FILE...`, unless that was done for the same files.
install() {
  local name=$1 version=$2 command=$3 folder=$target/$1 reason
  shift 3
  if [ -f "$folder/version" ] && cat "$@" 2>/dev/null | cmp -s - "$folder/installed-from"; then return; fi
  rm -rf "$folder" "$target/$name.skipped"
  mkdir "$folder"
  say "$name: $version"
  if reason=$("$command" "$folder" "$@" 2>&1 >>"$log"); then
    cat "$@" >"$folder/installed-from"
    echo "$version" >"$folder/version"
  else
    reason=$(grep . <<<"$reason" | tail -n1 || true)
    rm -rf "$folder"
    echo "$version: ${reason:-see $log}" >"$target/$name.skipped"
    say "skipped: $name: $(cat "$target/$name.skipped")"
  fi
}

missing() { echo "there is no $1 here" >&2; return 1; }

# Python: each client in a folder for PYTHONPATH, all under one interpreter.
python() {
  [ -x "$target/python/bin/python" ] || python3 -m venv "$target/python" || return
  "$target/python/bin/pip" install --quiet --no-input --disable-pip-version-check --no-deps \
--retries=1 --only-binary :all: --target "$1" --requirement "$2"
}

# Sources, because nobody has made wheels of them.
python_source() {
  [ -x "$target/python/bin/python" ] || python3 -m venv "$target/python" || return
  "$target/python/bin/pip" install --quiet --no-input --disable-pip-version-check --no-deps \
    --retries=1 --target "$1" --requirement "$2"
}

node() {
  command -v npm >/dev/null || missing npm || return
  cp "$2" "$3" "$1"
  npm --prefix "$1" ci --ignore-scripts --no-audit --no-fund --silent
}

go_build() {
  local go
  go=$("$here/../cluster/find-go.sh") || return
  (cd "$(dirname "$2")" && CGO_ENABLED=0 "$go" build -trimpath -ldflags "-s -w" -o "$1/client" "${go_package:-.}")
}

lab() { :; }

pins() { echo "$here/$1/pins/$2"; }
pip_client() { install "$1" "$(head -n1 "$(pins python "$1.txt")" | tr = ' ' | tr -s ' ')" "${2:-python}" "$(pins python "$1.txt")"; }
npm_client() {
  local pins
  pins=$(pins node "$1")
  install "$1" "$(sed -n 's/.*"dependencies":{"\([^"]*\)":"\([^"]*\)".*/\1 \2/p' "$pins/package.json")" node \
    "$pins/package.json" "$pins/package-lock.json"
}
go_client() {
  local module=$here/go/$1
  install "$1" "$(awk '/^require|^\t/ && $NF != "(" && !/indirect/ {sub(/^require /, ""); print $1, $2; exit}' "$module/go.mod")" \
    go_build "$module/go.mod" "$module/main.go"
}

quick() {
  pip_client boto-2.49
  pip_client botocore-1.5
  pip_client boto3
  pip_client awscli-1
  npm_client js-2.100
  npm_client js-2.1693
  npm_client js-3
  go_client go2
  install rust "$(awk '/^name = "aws-config"/ {getline; gsub(/[^0-9.]/, ""); print "aws-config", $0}' "$here/../../Cargo.lock")" \
    lab "$here/../../Cargo.lock"
}

quick
[ "${1:-}" = quick ] || : heavy
