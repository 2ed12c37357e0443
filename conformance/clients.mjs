// Drives the real server by the official TypeScript SDKs: version 1 (the revisions with sessions) and version 2 (2026-07-28, and by
// fallback those before), over HTTP and stdio. Usage: node clients.mjs URL PROGRAM ARGS...
import assert from "node:assert/strict";
import { Client as Client1 } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport as HTTP1 } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { StdioClientTransport as Stdio1 } from "@modelcontextprotocol/sdk/client/stdio.js";
import { Client as Client2, StreamableHTTPClientTransport as HTTP2 } from "@modelcontextprotocol/client";
import { StdioClientTransport as Stdio2 } from "@modelcontextprotocol/client/stdio";

const [url, command, ...args] = process.argv.slice(2);
const info = { name: "soulbox-conformance", version: "1" };

async function drive(name, client, transport) {
  await client.connect(transport);
  const { tools } = await client.listTools();
  assert.ok(tools.some((t) => t.name === "exec"), `${name}: no exec`);
  let notes = 0;
  const result = await client.callTool(
    { name: "exec", arguments: { command: "for i in 1 2 3; do echo line $i; sleep 0.6; done" } },
    ...(name.startsWith("v1") ? [undefined] : []),
    { onprogress: () => notes++ },
  );
  assert.equal(result.structuredContent.output, "line 1\nline 2\nline 3\n", name);
  assert.ok(notes > 0, `${name}: no progress`);
  const id = result.structuredContent.sandbox_id;
  const { resources } = await client.listResources();
  assert.ok(resources.some((r) => r.uri === `sandbox://${id}`), `${name}: the sandbox is not listed`);
  await client.callTool({ name: "file_write", arguments: { sandbox_id: id, path: "/home/user/x.txt", content: "hello\n" } });
  const read = await client.readResource({ uri: `sandbox://${id}/files/home/user/x.txt` });
  assert.equal(read.contents[0].text, "hello\n", name);
  const completion = await client.complete({ ref: { type: "ref/resource", uri: "sandbox://{id}" }, argument: { name: "id", value: id.slice(0, 5) } });
  assert.ok(completion.completion.values.includes(id), name);
  const bad = await client.callTool({ name: "exec", arguments: {} });
  assert.equal(bad.isError, true, name);
  await client.callTool({ name: "sandbox_kill", arguments: { sandbox_id: id, confirm: true } });
  await client.close();
  console.log(`ok ${name}: ${notes} notes of progress, revision ${client.getNegotiatedProtocolVersion?.() ?? transport.protocolVersion ?? "of its own choice"}`);
}

const modern = { versionNegotiation: { mode: "auto" } };
await drive("v1 over HTTP", new Client1(info), new HTTP1(new URL(url)));
await drive("v1 over stdio", new Client1(info), new Stdio1({ command, args }));
await drive("v2 over HTTP", new Client2(info, modern), new HTTP2(new URL(url)));
await drive("v2 over stdio", new Client2(info, modern), new Stdio2({ command, args }));
process.exit(0);
