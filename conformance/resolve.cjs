// Has every name below the test's domain be this machine, as a wildcard in the domain name system does.
const dns = require("node:dns");
const lookup = dns.lookup;
dns.lookup = (name, options, done) => {
  if (typeof options === "function") [options, done] = [{}, options];
  if (!name.endsWith(process.env.SOULBOX_TEST_DOMAIN)) return lookup(name, options, done);
  process.nextTick(() => (options.all ? done(null, [{ address: "127.0.0.1", family: 4 }]) : done(null, "127.0.0.1", 4)));
};
