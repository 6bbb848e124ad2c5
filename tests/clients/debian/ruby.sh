# The SDK for Ruby: Ruby and its gems from this folder.
set -eu
root=$CLIENT/root
for library in "$root"/usr/lib/*-linux-gnu; do LD_LIBRARY_PATH=$library; done
for folder in "$root"/usr/lib/ruby/vendor_ruby "$root"/usr/lib/ruby/3* "$root"/usr/lib/*/ruby/3* \
  "$root"/usr/lib/*/ruby/vendor_ruby/3* "$root"/usr/share/rubygems-integration/*/gems/*/lib "$root"/usr/lib/ruby/gems/*/gems/rexml-*/lib; do
  [ ! -d "$folder" ] || RUBYLIB=${RUBYLIB:+$RUBYLIB:}$folder
done
export LD_LIBRARY_PATH RUBYLIB
exec "$root"/usr/bin/ruby --disable-gems "$PROGRAMS/debian/with_ruby.rb"
