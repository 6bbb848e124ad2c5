// The SDK for JavaScript, version 3.
"use strict";

const { STSClient, GetCallerIdentityCommand } = require("@aws-sdk/client-sts");
const { fromNodeProviderChain } = require("@aws-sdk/credential-providers");
const { run } = require("./protocol");

const { STS_URL: endpoint, AWS_REGION: region } = process.env;
const client = new STSClient({ endpoint, region, credentials: fromNodeProviderChain(), maxAttempts: 1 });

const call = () => client.send(new GetCallerIdentityCommand({}));

// As if they had come to their end.
const again = async () => {
  await client.config.credentials({ forceRefresh: true });
  await call();
};

run(call, again);
