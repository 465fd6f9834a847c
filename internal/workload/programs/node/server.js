// Loads a handful of packages, serves one request to itself and says ready.
//
// With the argument "hold" it then waits to be stopped; else it ends.
"use strict";

const crypto = require("crypto");
const http = require("http");
const path = require("path");
const zlib = require("zlib");
const finalhandler = require("finalhandler");
const serveStatic = require("serve-static");
const yargs = require("yargs/yargs");

const hold = yargs(process.argv.slice(2)).argv._.includes("hold");
const files = serveStatic(__dirname, { index: [path.basename(__filename)] });

const server = http.createServer((request, response) => {
  files(request, response, finalhandler(request, response));
});
server.listen(0, "127.0.0.1", () => {
  http.get({ host: "127.0.0.1", port: server.address().port, agent: false }, (answer) => {
    const sum = crypto.createHash("sha256");
    answer.pipe(zlib.createGzip()).on("data", (part) => sum.update(part)).on("end", () => {
      console.log("ready", answer.statusCode, sum.digest("hex"));
      if (!hold) {
        server.close();
      }
    });
  });
});
process.on("SIGTERM", () => server.close());
