// How a program of the matrix tells what came of its calls: one line of JSON each, the next call for each line that
// comes in.
"use strict";

const readline = require("node:readline");

async function tell(call) {
  const start = process.hrtime.bigint();
  let error = null;
  try {
    await call();
  } catch (thrown) {
    error = `${thrown.name}: ${thrown.message}`;
  }
  console.log(JSON.stringify({ seconds: Number(process.hrtime.bigint() - start) / 1e9, error }));
}

exports.run = async (call, again = call) => {
  await tell(call);
  for await (const line of readline.createInterface({ input: process.stdin })) {
    await tell(line === "go on" ? call : again);
  }
};
