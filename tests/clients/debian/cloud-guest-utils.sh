# Debian: cloud-guest-utils=0.33-1
exec /usr/bin/python3 "$CLIENT/root/usr/bin/ec2metadata" "$@"
