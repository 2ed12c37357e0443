# SoulBox. `make demo` and `make test` need Go, git and make; everything else they build.
SHELL   := /bin/bash
.SHELLFLAGS := -o pipefail -c
GO      ?= go
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GVISOR  := $(shell sed -n 's|.*gvisor.dev/gvisor \(v[^ ]*\).*|\1|p' gvisor/runsc/go.mod)
LDFLAGS := -s -w -X main.version=$(VERSION)
# The race detector needs a C compiler; a bare machine has none. What compresses is not watched: it shares nothing, and would take ten times
# as long.
RACE    := $(shell command -v gcc >/dev/null && echo -race '-gcflags=github.com/klauspost/compress/...=-race=false')
export CGO_ENABLED = $(if $(findstring -race,$(RACE)),1,0)

.PHONY: build demo test lint golden bench soak conformance suites clean
.DELETE_ON_ERROR:

build: bin/runsc
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

# gVisor with gvisor/runsc/patches. The folder of the patches is named, too, so that one that is taken away is noticed.
PATCHES := $(wildcard gvisor/runsc/patches/*.patch) gvisor/runsc/patches gvisor/patch/main.go gvisor/patch/patch.go

bin/runsc: gvisor/runsc/go.mod gvisor/runsc/go.sum gvisor/runsc/main.go $(PATCHES)
	@echo "building runsc $(GVISOR), once; this takes some minutes"
	mkdir -p bin .cache
	CGO_ENABLED=0 $(GO) run ./gvisor/patch -to .cache/gvisor
	cd gvisor/runsc && CGO_ENABLED=0 $(GO) build -modfile=$(CURDIR)/.cache/gvisor.mod -trimpath -o ../../bin/runsc \
		-ldflags '-s -w -X gvisor.dev/gvisor/runsc/version.version=$(GVISOR)' .; status=$$?; cd ../..; rm -rf .cache/gvisor*; exit $$status

demo: build
	timeout 120 bin/soulbox-mcp demo

# With -short, tests repeat less: 'make soak' has the full amounts. Programs are tested from outside, where the race detector sees nothing
# but the tests.
test: build
	timeout 1380 bash -c '$(GO) test -short -timeout 20m ./cmd/... & programs=$$!; \
		$(GO) test -short $(RACE) -timeout 20m $$($(GO) list ./... | grep -v /cmd/); rest=$$?; wait $$programs && exit $$rest'

lint:
	@out=$$(find . -name '*.go' -not -path './.cache/*' -exec gofmt -l {} +); \
		test -z "$$out" || { echo "gofmt these:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) mod tidy -diff
	cd gvisor/runsc && $(GO) mod tidy -diff

# Rewrites the recorded outputs that tests compare with; review them as a diff.
golden: build
	UPDATE_GOLDEN=1 $(GO) test ./tools ./mcpserver ./cmd/... ./api/envd/spec -run 'Golden|Readme|Generated|Demo' -count=1
	@if [ "$$(id -u)" = 0 ] && command -v buildah >/dev/null; then \
		UPDATE_GOLDEN=1 $(GO) test ./template -run '^TestConformance$$' -count=1 -timeout 30m; \
	else echo "what buildah makes of Dockerfiles is recorded as root only, with Debian's buildah and crun"; fi

# The official MCP conformance suite, the Inspector, the TypeScript SDKs and E2B's SDK, from npm, against the real program, and the suite's
# parts that need tools of their own against conformance/server.
conformance: build
	@command -v npm >/dev/null || { echo "npm is missing: apt-get install npm"; exit 1; }
	timeout 1500 conformance/run.sh

# Test suites of well-known programs, outside and in a sandbox: what differs is known (conformance/suites/differences.txt), or it fails.
suites: build
	timeout 3000 conformance/suites/run.sh

# Half an hour of everything at random on two servers of one state directory, which are killed and starved (tests have a short form); then
# what one owner's attacks do to another's commands, as a table; then, in full, the tests of which 'make test' repeats less.
soak: build
	timeout 2700 env SOULBOX_SOAK=30m $(GO) test ./cmd/soulbox-mcp -run '^TestSoak$$' -timeout 40m -count=1 -v
	timeout 1500 env SOULBOX_SOAK=30m $(GO) test ./cmd/soulbox-mcp -run '^TestSoakNeighbours$$' -timeout 20m -count=1 -v
	timeout 1500 $(GO) test ./agent/guest ./cmd/soulbox-mcp -timeout 20m -count=1 \
		-run '^(TestShellFuzz|TestTreeRebuilt|TestNothingIsLost|TestThousandRequests|TestForks|TestLimitsNeighbours)$$'

bench: build
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/ ./internal/spawntime
	timeout 1200 env CGO_ENABLED=0 $(GO) test ./cmd/... -run '^$$' -bench . -benchtime 1x -timeout 14m -v | grep -v -e '^=== ' -e '^ok'

clean:
	rm -rf bin .cache/gvisor*
