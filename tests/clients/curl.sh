# Uses IMDSv2 as AWS documents it, then makes a call that curl signs itself.
set -eu
imds=http://169.254.169.254/latest
TOKEN=$(curl -fsS -X PUT "$imds/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 21600")
role=$(curl -fsS -H "X-aws-ec2-metadata-token: $TOKEN" "$imds/meta-data/iam/security-credentials/")
document=$(curl -fsS -H "X-aws-ec2-metadata-token: $TOKEN" "$imds/meta-data/iam/security-credentials/$role")
field() { printf %s "$document" | tr -d '\n' | sed "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/"; }
# Passes secrets in a header file, not as arguments, which other processes can see.
printf 'user = "%s:%s"\nheader = "x-amz-security-token: %s"\n' "$(field AccessKeyId)" "$(field SecretAccessKey)" "$(field Token)" |
  curl -fsS --aws-sigv4 "aws:amz:$AWS_REGION:sts" --config - --data "Action=GetCallerIdentity&Version=2011-06-15" "$STS_URL/"
