# AsyncAws for PHP: PHP, its extensions and its libraries from this folder.
. "$PROGRAMS/debian/own_libraries.sh"
for extensions in "$root"/usr/lib/php/20*; do :; done
for php in "$root"/usr/bin/php8.*; do :; done
set -- -n -d extension_dir="$extensions" -d include_path="$root/usr/share/php" -d display_errors=stderr -d error_reporting=1
for extension in dom simplexml; do set -- "$@" -d extension=$extension; done
start "$php" "$@" "$PROGRAMS/debian/with_async_aws.php"
