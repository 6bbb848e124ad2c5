# Debian: amazon-ec2-utils=2.0.1-2
exec "$CLIENT/root/usr/bin/ec2-metadata" "$@"
