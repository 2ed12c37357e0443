// Drives the real server by the published E2B SDK, as its users do. Usage: node e2b.mjs PACKAGE MODE, where MODE is tls (a domain with
// wildcard names), plain (one URL for all) or debug (one sandbox without control plane); the environment says where the server is.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync, mkdirSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";

const [pkg, mode] = process.argv.slice(2);
const sdk = await import(pkg);
const { Sandbox, Template } = sdk;
const modern = pkg === "e2b"; // the latest version
const remote = mode !== "debug";
const marker = "t" + randomBytes(4).toString("hex");
const left = []; // sandboxes that are to be ended
let failed = 0, passed = 0;

async function check(name, only, run) {
  if (!only) return;
  const began = performance.now();
  const before = left.length;
  try {
    await run();
    passed++;
    console.log(`ok ${name} ${(performance.now() - began) | 0} ms`);
  } catch (e) {
    failed++;
    console.log(`FAIL ${name}: ${e} ${e?.cause ?? ""}\n${e?.stack ?? ""}`);
  }
  await Promise.all(left.splice(before).map((s) => s.kill().catch(() => {}))); // the server has room for so many
}

async function rejects(promise, kind, text = "") {
  let error;
  try {
    await promise;
  } catch (e) {
    error = e;
  }
  assert.ok(error, `nothing was wrong, want ${kind}`);
  assert.equal(error.constructor.name, kind, String(error.stack));
  assert.ok(String(error.message).includes(text), `${error.message}: want ${text}`);
  return error;
}

async function until(what, holds) {
  for (const end = Date.now() + 60_000; Date.now() < end; ) {
    if (await holds()) return;
    await new Promise((r) => setTimeout(r, 50));
  }
  assert.fail(`not so: ${what}`);
}

async function make(opts = {}, template) {
  const all = { timeoutMs: 300_000, metadata: { run: marker }, ...opts };
  const sbx = await (template ? Sandbox.create(template, all) : Sandbox.create(all));
  left.push(sbx);
  return sbx;
}

const sha = (b) => createHash("sha256").update(b).digest("hex");
const sbx = await make({ envs: { FOO: "bar" } });

// Commands

await check("commands: output, environment, user, directory", true, async () => {
  const seen = [];
  const r = await sbx.commands.run('echo out; echo err >&2; echo "$A"; id -un; pwd', { envs: { A: "1 2" }, onStdout: (d) => seen.push(d), cwd: "/tmp" });
  assert.equal(r.stdout, "out\n1 2\nuser\n/tmp\n");
  assert.equal(r.stderr, "err\n");
  assert.equal(seen.join(""), r.stdout);
  if (remote) assert.equal((await sbx.commands.run("echo $FOO")).stdout, "bar\n");
  assert.equal((await sbx.commands.run("id -un; pwd", { user: "root" })).stdout, "root\n/root\n");
  assert.equal((await sbx.commands.run("printf 'h\\xc3\\xa4\\xf0\\x9f\\x98\\x80'")).stdout, "hä😀");
});

await check("commands: errors", true, async () => {
  const e = await rejects(sbx.commands.run("echo no; exit 3"), "CommandExitError");
  assert.deepEqual([e.exitCode, e.stdout, e.error], [3, "no\n", "exit status 3"]);
  assert.equal((await rejects(sbx.commands.run("nosuchcommand"), "CommandExitError")).exitCode, 127);
  assert.equal((await rejects(sbx.commands.run("kill -9 $$"), "CommandExitError")).error, "signal: killed");
  await rejects(sbx.commands.run("true", { cwd: "/nosuch" }), "InvalidArgumentError", "cwd '/nosuch' does not exist");
  await rejects(sbx.commands.run("true", { user: "nobody-such" }), "AuthenticationError", "invalid username: 'nobody-such'");
});

await check("commands: a timeout ends the command", true, async () => {
  await rejects(sbx.commands.run("sleep 1000 & sleep 1001", { timeoutMs: 800 }), "TimeoutError", "deadline_exceeded");
  await until("it runs no more", async () => !(await sbx.commands.list()).some((p) => p.args.join(" ").includes("sleep 1001")));
});

await check("commands: background, stdin, connect, kill", true, async () => {
  const h = await sbx.commands.run("while read l; do echo got $l; done; echo over", { background: true, stdin: true });
  await sbx.commands.sendStdin(h.pid, "one\n");
  const late = await sbx.commands.connect(h.pid);
  await sbx.commands.sendStdin(h.pid, new TextEncoder().encode("two\n").length ? "two\n" : "");
  await until("both", () => late.stdout.includes("got two"));
  if (modern) await sbx.commands.closeStdin(h.pid);
  else await sbx.commands.kill(h.pid);
  if (modern) {
    assert.equal((await h.wait()).stdout, "got one\ngot two\nover\n");
    assert.ok((await late.wait()).stdout.endsWith("got two\nover\n"));
  }
  const k = await sbx.commands.run("sleep 1000", { background: true, timeoutMs: 0 });
  assert.ok((await sbx.commands.list()).some((p) => p.pid === k.pid));
  assert.equal(await k.kill(), true);
  assert.equal((await rejects(k.wait(), "CommandExitError")).exitCode, -1);
  assert.equal(await sbx.commands.kill(k.pid), false);
  await rejects(sbx.commands.connect(999_999), "NotFoundError");
  const d = await sbx.commands.run("for i in 1 2 3 4 5; do echo $i; sleep 0.1; done", { background: true });
  await d.disconnect();
  await until("it goes on and ends", async () => !(await sbx.commands.list()).some((p) => p.pid === d.pid));
});

await check("commands: a child that holds stdout does not hold the call", true, async () => {
  const began = Date.now();
  assert.equal((await sbx.commands.run("sleep 1000 & echo done")).stdout, "done\n");
  assert.ok(Date.now() - began < 30_000);
  await sbx.commands.run("pkill sleep || true");
});

await check("commands: 64 MB come whole through a reader that is slow", true, async () => {
  const hash = createHash("sha256");
  let n = 0;
  await sbx.commands.run("head -c 67108864 /dev/zero | tr '\\0' x", {
    timeoutMs: 0,
    onStdout: async (d) => {
      hash.update(d);
      n += d.length;
      if (n % 7 === 0) await new Promise((r) => setTimeout(r, 5));
    },
  });
  assert.equal(n, 64 << 20);
  assert.equal(hash.digest("hex"), sha(Buffer.alloc(64 << 20, "x")));
});

// Terminals

await check("pty: type, resize, connect, kill", true, async () => {
  let screen = "";
  const decode = new TextDecoder();
  const t = await sbx.pty.create({ cols: 80, rows: 24, onData: (d) => (screen += decode.decode(d)), envs: { PTYVAR: "v" }, timeoutMs: 0 });
  const type = (text) => sbx.pty.sendInput(t.pid, new TextEncoder().encode(text));
  await type("stty size; echo $PTYVAR-$TERM\n");
  await until("size", () => screen.includes("24 80") && screen.includes("v-xterm-256color"));
  await sbx.pty.resize(t.pid, { cols: 100, rows: 30 });
  await type("stty size\n");
  await until("new size", () => screen.includes("30 100"));
  if (sbx.pty.connect) {
    let other = "";
    await sbx.pty.connect(t.pid, { onData: (d) => (other += decode.decode(d)), timeoutMs: 0 });
    await type("echo other-$((40+2))\n");
    await until("both see", () => other.includes("other-42") && screen.includes("other-42"));
  }
  assert.equal(await sbx.pty.kill(t.pid), true);
  await rejects(t.wait(), "CommandExitError");
});

// Files

await check("files: every way in and out", true, async () => {
  const bytes = new Uint8Array(randomBytes(100_000));
  const info = await sbx.files.write("dir/a.txt", "text ä");
  assert.deepEqual([info.name, info.path, info.type], ["a.txt", "/home/user/dir/a.txt", "file"]);
  assert.equal(await sbx.files.read("dir/a.txt"), "text ä");
  await sbx.files.write("/tmp/b", bytes.buffer);
  assert.deepEqual(await sbx.files.read("/tmp/b", { format: "bytes" }), bytes);
  assert.equal((await sbx.files.read("/tmp/b", { format: "blob" })).size, bytes.length);
  await sbx.files.write("/tmp/c", new Blob([bytes]));
  await sbx.files.write("/tmp/d", new Blob([bytes]).stream());
  for (const f of ["c", "d"]) {
    const parts = [];
    for await (const p of await sbx.files.read(`/tmp/${f}`, { format: "stream" })) parts.push(p);
    assert.equal(sha(Buffer.concat(parts)), sha(bytes));
  }
  const many = await sbx.files.write([{ path: "m/1", data: "one" }, { path: "/tmp/m2", data: "two" }]);
  assert.deepEqual(many.map((f) => f.path), ["/home/user/m/1", "/tmp/m2"]);
  assert.equal(await sbx.files.read("m/1"), "one");
  await sbx.files.write("empty", "");
  assert.equal(await sbx.files.read("empty"), "");
  assert.equal((await sbx.files.read("empty", { format: "bytes" })).length, 0);
  await sbx.files.write("/root/r", "root's", { user: "root" });
  assert.equal((await sbx.commands.run("stat -c %U /root/r /tmp/b", { user: "root" })).stdout, "root\nuser\n");
  if (modern) {
    await sbx.files.write("gz", "z".repeat(1e6), { gzip: true, metadata: { colour: "blue" } });
    assert.equal((await sbx.files.read("gz", { gzip: true })).length, 1e6);
    assert.deepEqual((await sbx.files.getInfo("gz")).metadata, { colour: "blue" });
    await sbx.files.write("gz", "over", { metadata: { size: "9" } });
    assert.deepEqual((await sbx.files.getInfo("gz")).metadata, { size: "9" });
    await sbx.files.write("gz", "plain");
    assert.equal((await sbx.files.getInfo("gz")).metadata, undefined);
    await sbx.files.write("oct", "o", { useOctetStream: true });
    assert.equal(await sbx.files.read("oct"), "o");
  }
});

await check("files: list, info, links, rename, remove", true, async () => {
  await sbx.commands.run("mkdir -p /tmp/t/x/y; echo 1 > /tmp/t/x/f; echo 2 > /tmp/t/x/y/g; ln -s x/f /tmp/t/l; ln -s x /tmp/t/ld; chmod 640 /tmp/t/x/f");
  assert.deepEqual((await sbx.files.list("/tmp/t")).map((e) => `${e.name} ${e.type}`), ["l file", "ld dir", "x dir"]);
  assert.deepEqual((await sbx.files.list("/tmp/t", { depth: 3 })).map((e) => e.path), ["/tmp/t/l", "/tmp/t/ld", "/tmp/t/x", "/tmp/t/x/f", "/tmp/t/x/y", "/tmp/t/x/y/g"]);
  const i = await sbx.files.getInfo("/tmp/t/x/f");
  assert.deepEqual([i.size, i.mode, i.permissions, i.owner, i.group], [2, 0o640, "-rw-r-----", "user", "user"]);
  const l = await sbx.files.getInfo("/tmp/t/l");
  assert.deepEqual([l.type, l.symlinkTarget, l.permissions[0]], ["file", "/tmp/t/x/f", "L"]);
  assert.equal(await sbx.files.makeDir("/tmp/t/new/deep"), true);
  assert.equal(await sbx.files.makeDir("/tmp/t/new/deep"), false);
  assert.equal(await sbx.files.exists("/tmp/t/new/deep"), true);
  assert.equal((await sbx.files.rename("/tmp/t/x/f", "/tmp/t/new/f2")).path, "/tmp/t/new/f2");
  assert.equal(await sbx.files.exists("/tmp/t/x/f"), false);
  await sbx.files.remove("/tmp/t");
  await sbx.files.remove("/tmp/t");
  await rejects(sbx.files.read("/tmp/t/none"), "FileNotFoundError", "does not exist");
  await rejects(sbx.files.list("/tmp/none"), "FileNotFoundError");
  await rejects(sbx.files.getInfo("/tmp/none"), "FileNotFoundError");
  await rejects(sbx.files.rename("/tmp/none", "/tmp/n2"), "FileNotFoundError");
  await rejects(sbx.files.read("/tmp"), "InvalidArgumentError", "is a directory");
  await rejects(sbx.files.list("/etc/passwd"), "InvalidArgumentError");
  await rejects(sbx.files.read("x", { user: "nosuch" }), "AuthenticationError");
});

await check("files: 3,000 entries", true, async () => {
  await sbx.commands.run("mkdir /tmp/many && cd /tmp/many && for d in 1 2 3; do mkdir $d; (cd $d; touch $(seq -f file-%g-with-a-name-that-is-long-enough-to-need-more-than-one-answer 1000)); done");
  assert.equal((await sbx.files.list("/tmp/many", { depth: 2 })).length, 3003);
});

await check("files: 100 MB there and back", true, async () => {
  const big = randomBytes(100 << 20);
  await sbx.files.write("/tmp/big", new Blob([big]), { requestTimeoutMs: 0 });
  assert.equal((await sbx.commands.run("sha256sum /tmp/big", { timeoutMs: 0 })).stdout.slice(0, 64), sha(big));
  const hash = createHash("sha256");
  for await (const p of await sbx.files.read("/tmp/big", { format: "stream", requestTimeoutMs: 0 })) hash.update(p);
  assert.equal(hash.digest("hex"), sha(big));
  await sbx.files.remove("/tmp/big");
});

await check("files: watch", true, async () => {
  await sbx.files.makeDir("/tmp/w/sub");
  const seen = [];
  const w = await sbx.files.watchDir("/tmp/w", (e) => seen.push(e), { recursive: true, timeoutMs: 0, ...(modern ? { includeEntry: true } : {}) });
  const has = (type, name) => seen.some((e) => e.type === type && e.name === name);
  await sbx.files.write("/tmp/w/sub/f", "1");
  await until("created and written", () => has("create", "sub/f") && has("write", "sub/f"));
  seen.length = 0;
  await sbx.files.write("/tmp/w/sub/f", "2");
  await until("written over", () => has("write", "sub/f"));
  assert.ok(!has("create", "sub/f"), JSON.stringify(seen));
  await sbx.commands.run("echo 2 >> /tmp/w/sub/f; chmod 600 /tmp/w/sub/f; mv /tmp/w/sub/f /tmp/w/g; rm /tmp/w/g");
  await until("all", () => has("write", "sub/f") && has("chmod", "sub/f") && has("rename", "sub/f") && has("create", "g") && has("remove", "g"));
  if (modern) assert.ok(seen.some((e) => e.entry?.path === "/tmp/w/sub/f"));
  await w.stop();
  await rejects(sbx.files.watchDir("/tmp/none", () => {}), "FileNotFoundError");
});

// Life

await check("life: info, list, filters, pages", remote, async () => {
  const info = await sbx.getInfo();
  assert.deepEqual([info.sandboxId, info.state, info.metadata.run, info.cpuCount, info.memoryMB], [sbx.sandboxId, "running", marker, 2, 1024]);
  assert.ok(info.endAt - info.startedAt > 200_000);
  const more = [await make({ metadata: { run: marker, "a k": "b&c=d" } }), await make({ metadata: { run: marker } })];
  const ids = async (query, rest = {}) => {
    const all = [];
    const p = Sandbox.list({ query, ...rest });
    while (p.hasNext) all.push(...(await p.nextItems()));
    return all.map((s) => s.sandboxId);
  };
  const mine = { metadata: { run: marker } };
  const expected = [more[1], more[0], sbx].map((s) => s.sandboxId);
  assert.deepEqual(await ids(mine), expected);
  assert.deepEqual(await ids(mine, { limit: 1 }), expected);
  if (modern) assert.deepEqual(await ids(mine, { limit: 2, order: "asc" }), expected.toReversed());
  assert.deepEqual(await ids({ metadata: { "a k": "b&c=d" } }), [more[0].sandboxId]);
  assert.deepEqual(await ids({ metadata: { run: "other" } }), []);
  assert.deepEqual(await ids({ ...mine, state: ["paused"] }), []);
  for (const s of more) assert.equal(await s.kill(), true);
});

await check("life: timeout, connect, kill", remote, async () => {
  const s = await make();
  await s.setTimeout(60_000);
  const at = async () => +(await s.getInfo()).endAt - Date.now();
  assert.ok((await at()) < 61_000);
  const again = await Sandbox.connect(s.sandboxId, { timeoutMs: 10_000 });
  assert.ok((await at()) > 40_000, "connect has shortened a life");
  await Sandbox.connect(s.sandboxId, { timeoutMs: 600_000 });
  assert.ok((await at()) > 500_000);
  assert.equal((await again.commands.run("echo same")).stdout, "same\n");
  assert.equal(await s.isRunning(), true);
  assert.equal(await Sandbox.kill(s.sandboxId), true);
  assert.equal(await s.isRunning(), false);
  assert.equal(await s.kill(), false);
  await rejects(s.commands.run("true"), "SandboxNotFoundError");
  await rejects(Sandbox.connect(s.sandboxId), "SandboxNotFoundError");
  await rejects(s.getInfo(), "SandboxNotFoundError");
  await rejects(Sandbox.create("nosuchtemplate"), "SandboxError", "404");
});

await check("life: a killed sandbox breaks its streams off, an ended one ends them", remote, async () => {
  const s = await make();
  const h = await s.commands.run("sleep 1000", { background: true, timeoutMs: 0 });
  const error = h.wait().catch((e) => e);
  await s.commands.run("true");
  const began = Date.now();
  await s.kill();
  const e = await error;
  assert.ok(Date.now() - began < 10_000, `after ${Date.now() - began} ms`);
  if (modern) {
    assert.equal(e.constructor.name, "TimeoutError", String(e));
    assert.ok(e.message.includes("The sandbox was killed or reached its end of life"), e.message);
  }
});

await check("life: pause and resume, with memory and without", remote, async () => {
  const s = await make();
  const h = await s.commands.run("i=0; while true; do i=$((i+1)); echo $i > /tmp/n; sleep 0.05; done", { background: true, timeoutMs: 0 });
  h.wait().catch(() => {});
  await s.files.write("/tmp/kept", "kept");
  await until("it counts", async () => +(await s.files.read("/tmp/n").catch(() => 0)) > 2);
  await (s.pause ?? s.betaPause).call(s);
  assert.equal((await s.getInfo()).state, "paused");
  if (modern) {
    assert.equal(await s.pause(), false);
    await rejects(s.setTimeout(60_000), "SandboxNotFoundError");
  }
  await rejects(s.commands.run("true"), "SandboxNotFoundError");
  await s.connect();
  assert.equal(await s.files.read("/tmp/kept"), "kept");
  const n = +(await s.files.read("/tmp/n"));
  await until("it counts on", async () => +(await s.files.read("/tmp/n")) > n);
  assert.ok((await s.commands.list()).some((p) => p.pid === h.pid));
  if (modern) {
    await s.pause({ keepMemory: false });
    await s.connect();
    assert.equal(await s.files.read("/tmp/kept"), "kept");
    assert.equal((await s.commands.list()).length, 0);
    assert.deepEqual(await Promise.all([s.pause(), s.pause(), s.pause()]), [true, true, true]);
    const pausing = s.connect().then(() => s.pause());
    await pausing;
    assert.deepEqual((await Promise.all([s.connect(), s.connect()])).map((c) => c.sandboxId), [s.sandboxId, s.sandboxId]);
    assert.equal(await s.isRunning(), true);
  }
});

await check("life: paused at its timeout, woken by a command", remote && modern, async () => {
  const s = await make({ timeoutMs: 4_000, lifecycle: { onTimeout: "pause", autoResume: true } });
  await s.files.write("/tmp/f", "before");
  await until("it is paused", async () => (await s.getInfo()).state === "paused");
  assert.equal(await s.files.read("/tmp/f"), "before");
  const i = await s.getInfo();
  assert.deepEqual([i.state, i.lifecycle], ["running", { onTimeout: "pause", autoResume: true }]);
  assert.ok(i.endAt - Date.now() > 200_000);
  await s.pause({ keepMemory: false });
  await rejects(s.commands.run("true"), "SandboxNotFoundError"); // traffic boots it no more
  assert.equal((await s.getInfo()).state, "paused");
  const long = await make({ timeoutMs: 1_800_000, lifecycle: { onTimeout: "pause", autoResume: true } });
  await long.setTimeout(60_000);
  await long.pause();
  await long.commands.run("true");
  assert.ok((await long.getInfo()).endAt - Date.now() > 1_700_000);
});

await check("life: without a token, where the server allows it", !modern && mode === "tls", async () => {
  const s = await make({ secure: false });
  assert.equal((await s.commands.run("echo open")).stdout, "open\n");
  assert.equal((await fetch(`https://${s.getHost(49983)}/envs`)).status, 200);
  assert.equal((await fetch(`https://${sbx.getHost(49983)}/envs`)).status, 401);
});

await check("snapshots", remote && modern, async () => {
  const s = await make();
  await s.files.write("/tmp/state", "v1");
  const snap = await s.createSnapshot({ name: `snap-${marker}` });
  await s.files.write("/tmp/state", "v2");
  const copy = await make({}, snap.snapshotId);
  assert.equal(await copy.files.read("/tmp/state"), "v1");
  const list = async () => (await Sandbox.listSnapshots({ sandboxId: s.sandboxId }).nextItems()).map((x) => x.snapshotId);
  assert.deepEqual(await list(), [snap.snapshotId]);
  await s.createSnapshot({ name: `snap-${marker}` });
  assert.equal((await list()).length, 1);
  assert.equal(await (await make({}, snap.snapshotId)).files.read("/tmp/state"), "v2");
  assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), true);
  assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), false);
  assert.match(snap.snapshotId, new RegExp(`^[a-z0-9]+/snap-${marker}:default$`));
  assert.equal((await copy.getInfo()).templateId, `snap-${marker}`);
  const unnamed = await s.createSnapshot();
  assert.match(unnamed.snapshotId, /^[a-z0-9]{20}:default$/);
  assert.deepEqual([unnamed.names ?? []], [[]]);
  const tagged = await s.createSnapshot({ name: `snap-${marker}:v2` });
  assert.ok(tagged.snapshotId.endsWith(`/snap-${marker}:v2`));
  for (const one of [unnamed, tagged]) {
    assert.equal(await (await make({}, one.snapshotId)).files.read("/tmp/state"), "v2");
    assert.equal(await Sandbox.deleteSnapshot(one.snapshotId), true);
  }
});

await check("fork", remote && modern, async () => {
  const s = await make({ timeoutMs: 600_000 });
  await s.commands.run("echo $RANDOM > /dev/shm/r", {});
  const want = await s.files.read("/dev/shm/r");
  const copies = await s.fork({ count: 2, timeoutMs: 100_000 });
  assert.equal(copies.length, 2);
  for (const c of copies) {
    left.push(c);
    assert.notEqual(c.sandboxId, s.sandboxId);
    assert.equal(await c.files.read("/dev/shm/r"), want);
    await c.files.write("/dev/shm/r", c.sandboxId);
    assert.ok((await c.getInfo()).endAt - Date.now() < 101_000);
  }
  assert.equal(await s.files.read("/dev/shm/r"), want);
});

await check("metrics", remote, async () => {
  await until("there are some", async () => {
    const m = await sbx.getMetrics();
    return m.length > 0 && m.at(-1).cpuCount === 2 && m.at(-1).memTotal === 1 << 30 && m.at(-1).memUsed > 1 << 20 && m.at(-1).diskTotal > 0;
  });
});

// Network

await check("ports: all at their own numbers, as long as something listens", mode === "debug", async () => {
  const port = 20_000 + Math.floor(Math.random() * 10_000);
  await sbx.files.write("/tmp/www/index.html", "from inside");
  const h = await sbx.commands.run(`exec python3 -m http.server ${port} --bind 127.0.0.1 --directory /tmp/www`, { background: true, timeoutMs: 0 });
  h.wait().catch(() => {});
  const get = () => fetch(`http://${sbx.getHost(port)}/`).then((r) => r.text(), () => "");
  await until("it serves", async () => (await get()) === "from inside");
  await h.kill();
  await until("it is closed", async () => (await get()) === "");
});

await check("ports: by name, private ones by their token", mode === "tls", async () => {
  const serve = "python3 -m http.server 8000 --bind 127.0.0.1 --directory /tmp/www";
  const s = await make(modern ? { network: { allowPublicTraffic: false } } : {});
  await s.files.write("/tmp/www/index.html", "from inside");
  const h = await s.commands.run(serve, { background: true, timeoutMs: 0 });
  h.wait().catch(() => {});
  const get = (headers) => fetch(`https://${s.getHost(8000)}/`, { headers });
  const headers = modern ? { "e2b-traffic-access-token": s.trafficAccessToken } : {};
  await until("it serves", async () => (await get(headers)).status === 200);
  assert.equal(await (await get(headers)).text(), "from inside");
  if (modern) assert.equal((await get({})).status, 403);
  assert.equal((await fetch(`https://${s.getHost(8001)}/`, { headers })).status, 502);
});

await check("network: changed while it runs", remote && modern, async () => {
  const s = await make();
  assert.equal((await s.getInfo()).allowInternetAccess, true);
  const ask = (url) => s.commands.run(`python3 -c 'import urllib.request as u; u.urlopen("${url}", timeout=10)'`);
  await s.updateNetwork({ denyOut: ["0.0.0.0/0"] });
  for (const url of ["http://192.0.2.1/", "https://192.0.2.1/"]) { // no page, and no success
    const e = await rejects(ask(url), "CommandExitError");
    assert.ok(e.exitCode !== 0 && /RemoteDisconnected|Connection|403/.test(e.stderr), e.stderr);
  }
  assert.deepEqual((await s.getInfo()).network.denyOut, ["0.0.0.0/0"]);
  await rejects(s.updateNetwork({ allowOut: ["example.com"] }), "SandboxError", "400");
  await s.updateNetwork({ allowOut: ["*"], denyOut: ["8.8.8.8", "192.0.2.7/24"] });
  const { allowOut, denyOut } = (await s.getInfo()).network;
  assert.deepEqual([allowOut, denyOut], [["*"], ["8.8.8.8", "192.0.2.7/24"]]);
});

await check("signed URLs", mode === "tls", async () => {
  await sbx.files.write("/tmp/signed", "secret");
  const down = await sbx.downloadUrl("/tmp/signed", { useSignatureExpiration: 60 });
  assert.equal(await (await fetch(down)).text(), "secret");
  assert.equal((await fetch(down, { headers: { Range: "bytes=1-3" } })).status, 206);
  const up = await sbx.uploadUrl("/tmp/up", { useSignatureExpiration: 60 });
  const form = new FormData();
  form.append("file", new Blob(["uploaded"]), "x");
  assert.equal((await fetch(up, { method: "POST", body: form })).status, 200);
  assert.equal(await sbx.files.read("/tmp/up"), "uploaded");
  for (const wrong of [down.replace("signed", "up"), down.replace("signature=v1_", "signature=v1_A"), up, down.replace("signature_expiration=", "signature_expiration=9")]) {
    assert.equal((await fetch(wrong)).status, 401, wrong);
  }
  const old = await sbx.downloadUrl("/tmp/signed", { useSignatureExpiration: -5 });
  assert.deepEqual(await (await fetch(old)).json(), { code: 401, message: "signature is already expired" });
});

// Templates

await check("template: build from a Dockerfile, tags, use", remote, async () => {
  const dir = mkdtempSync(path.join(tmpdir(), "soulbox-e2b-"));
  try {
    mkdirSync(path.join(dir, "app"));
    writeFileSync(path.join(dir, "app/data.txt"), "copied\n");
    writeFileSync(path.join(dir, "Dockerfile"), "FROM mini\nENV GREETING=hello\nCOPY app /srv/app\nRUN echo built > /built && id -un >> /built\nWORKDIR /srv/app\n");
    const lines = [];
    const name = `tpl-${marker}`;
    const template = Template({ fileContextPath: dir }).fromDockerfile(path.join(dir, "Dockerfile")).runCmd("id -un > /home/user/more");
    const built = await Template.build(template, modern ? name : { alias: name, cpuCount: 1, memoryMB: 512 }, modern ? { cpuCount: 1, memoryMB: 512, onBuildLogs: (l) => lines.push(l.message) } : undefined);
    assert.ok(built.buildId, JSON.stringify(built));
    const s = await make({}, name);
    assert.equal((await s.commands.run("cat /srv/app/data.txt /built /home/user/more; pwd; echo $GREETING")).stdout, "copied\nbuilt\nroot\nuser\n/srv/app\nhello\n");
    assert.deepEqual([(await s.getInfo()).cpuCount, (await s.getInfo()).memoryMB], [1, 512]);
    if (modern) {
      assert.ok(lines.some((l) => l.includes("echo built")), lines.join("\n"));
      assert.equal(await Template.exists(name), true);
      assert.equal(await Template.exists("nosuch"), false);
      await Template.assignTags(name, ["v1", "stable"]);
      assert.deepEqual((await Template.getTags(name)).map((t) => t.tag).sort(), ["default", "stable", "v1"]);
      await Template.removeTags(name, ["v1"]);
      assert.equal((await (await make({}, `${name}:stable`)).commands.run("pwd")).stdout, "/srv/app\n");
      const bad = Template().fromTemplate("mini").runCmd("echo to the log; false");
      const e = await rejects(Template.build(bad, `bad-${marker}`), "BuildError", "failed to run command 'echo to the log; false'");
      assert.ok(e.message.includes("to the log"), e.message);
      const unknown = "failed to run command 'whoami': command failed: unauthenticated: invalid username: 'root123'";
      await rejects(Template.build(Template().fromTemplate("mini").runCmd("whoami", { user: "root123" }), `bad2-${marker}`), "BuildError", unknown);
      assert.match(built.buildId, /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$/);
      const grown = Template().fromTemplate(name).setEnvs({ LINES2: "a\nb", AT: "$GREETING/$HOME" }).runCmd('shopt -q login_shell && [[ $GREETING == h* ]] && printf "%s|" "$PWD" "$LINES2" "$AT" > /tmp/grown');
      await Template.build(grown, `grown-${marker}`);
      assert.equal(await (await make({}, `grown-${marker}`)).files.read("/tmp/grown"), "/srv/app|a\nb|hello//root|");
      assert.equal((await (await make({}, `${name}:${built.buildId}`)).commands.run("pwd")).stdout, "/srv/app\n");
      await rejects(Template.build(Template().fromTemplate("nosuch"), `bad3-${marker}`), "BuildError", "nosuch");
      const started = Template().fromTemplate("mini").setStartCmd("echo it begins; echo up > /tmp/up; sleep 1000", "test -e /tmp/up");
      const said = [];
      await Template.build(started, `started-${marker}`, { onBuildLogs: (l) => said.push(l.message) });
      assert.ok(said.includes("it begins"), said.join("\n"));
      assert.equal(await (await make({}, `started-${marker}`)).files.read("/tmp/up"), "up\n");
    }
  } finally {
    rmSync(dir, { recursive: true });
  }
});

await check("template: a Dockerfile by the API before build system 2.0", remote && modern, async () => {
  const ask = async (method, path, body) => {
    const r = await fetch((process.env.E2B_API_URL ?? `https://api.${process.env.E2B_DOMAIN}`) + path, { method, headers: { "X-API-Key": process.env.E2B_API_KEY }, body: body && JSON.stringify(body) });
    assert.equal(r.status, method === "GET" ? 200 : 202, path);
    return r.headers.get("content-length") === "0" ? undefined : r.json();
  };
  const made = await ask("POST", "/templates", { alias: `old-${marker}`, dockerfile: "FROM mini\nRUN echo old > /old\n", cpuCount: 1, memoryMB: 256 });
  assert.deepEqual(made.aliases, [`old-${marker}`]);
  const build = `/templates/${made.templateID}/builds/${made.buildID}`;
  await ask("POST", build);
  await until("it is built", async () => (await ask("GET", `${build}/status`)).status === "ready");
  assert.equal(await (await make({}, `old-${marker}`)).files.read("/old"), "old\n");
});

// What is refused

await check("refused: no key, another's key", remote && process.env.OTHER_KEY, async () => {
  const theirs = { apiKey: process.env.OTHER_KEY };
  const wrong = "SandboxNotFoundError";
  await rejects(Sandbox.connect(sbx.sandboxId, theirs), wrong);
  await rejects(Sandbox.getInfo(sbx.sandboxId, theirs), wrong);
  assert.equal(await Sandbox.kill(sbx.sandboxId, theirs), false);
  assert.deepEqual(await Sandbox.list({ ...theirs }).nextItems(), []);
  await rejects(Sandbox.create({ apiKey: "e2b_" + "0".repeat(40) }), "AuthenticationError");
});

for (const s of left) await s.kill().catch(() => {});
console.log(`${pkg} ${mode}: ${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
