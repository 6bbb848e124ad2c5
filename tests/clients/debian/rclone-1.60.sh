exec "$CLIENT/root/usr/bin/rclone" --config= --retries=1 --low-level-retries=1 cat \
  ":s3,provider=Other,env_auth=true,region=$AWS_REGION,endpoint='$S3_URL':$BUCKET/$KEY"
