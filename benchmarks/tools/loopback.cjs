// Portkey's gateway listens on every interface and has no setting for it. While it is measured it must not be a proxy for
// the network: loaded with `node --require`, this gives each port that is listened on the loopback address.
const { Server } = require("node:net");
const listen = Server.prototype.listen;
Server.prototype.listen = function (first, ...rest) {
  if (typeof first !== "number") return listen.call(this, first, ...rest);
  return listen.call(this, first, "127.0.0.1", ...rest.filter((argument) => typeof argument === "function"));
};
