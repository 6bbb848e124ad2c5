#!/bin/sh
# A C compiler for another architecture: zig's clang, with musl for ZIG_TARGET (aarch64-linux-musl). `tests/setup.sh
# release` installs zig from PyPI. The caller's --target is Rust's name for the same, which zig does not know.
for argument; do
  shift
  case $argument in --target=*) ;; *) set -- "$@" "$argument" ;; esac
done
# No helpers of a sanitizer's or of outlined atomics, which Rust's linking would lack.
exec "$(dirname "$0")/../target/zig/bin/python" -m ziglang cc -target "${ZIG_TARGET:?}" -fno-sanitize=all -mno-outline-atomics "$@"
