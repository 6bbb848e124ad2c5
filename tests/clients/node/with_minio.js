// MinIO's client for JavaScript.
"use strict";

// It reads the key of a role as `AccessKeyID`, which nobody writes, and would sign nothing: here it finds it so.
Object.defineProperty(Object.prototype, "AccessKeyID", {
  get() {
    return this.AccessKeyId;
  },
});

const { Client, IamAwsProvider } = require("minio");
const { run } = require("./protocol");

const { S3_URL, AWS_REGION: region, BUCKET, KEY } = process.env;
const { hostname: endPoint, port } = new URL(S3_URL);

// A provider for each call: there is no way to have one fetch before it is time.
run(async () => {
  const credentialsProvider = new IamAwsProvider({});
  const client = new Client({ endPoint, port: Number(port), useSSL: false, region, credentialsProvider });
  await client.statObject(BUCKET, KEY);
});
