# The SDK for Ruby of any age: Ruby and its gems from this folder.
. "$PROGRAMS/debian/own_libraries.sh"
for folder in "$root"/usr/lib/ruby/vendor_ruby "$root"/usr/lib/ruby/3* "$root"/usr/lib/*/ruby/3* \
  "$root"/usr/lib/*/ruby/vendor_ruby/3* "$root"/usr/share/rubygems-integration/*/gems/*/lib "$root"/usr/lib/ruby/gems/*/gems/rexml-*/lib; do
  [ ! -d "$folder" ] || RUBYLIB=${RUBYLIB:+$RUBYLIB:}$folder
done
export RUBYLIB
start "$root"/usr/bin/ruby --disable-gems "$PROGRAMS/debian/with_ruby.rb"
