// The SDK for JavaScript, version 2, of any age.
"use strict";

const AWS = require("aws-sdk");
const { run } = require("./protocol");

const sts = new AWS.STS({ endpoint: process.env.STS_URL, region: process.env.AWS_REGION, maxRetries: 0 });

const identify = () =>
  new Promise((resolve, reject) => sts.getCallerIdentity({}, (error, identity) => (error ? reject(error) : resolve(identity))));

// What a client does by itself when its credentials come to their end.
const refresh = () =>
  new Promise((resolve, reject) => sts.config.credentials.refresh((error) => (error ? reject(error) : resolve())));

run(identify, async () => {
  await refresh();
  await identify();
});
