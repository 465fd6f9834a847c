# Every target is a command that you may type by hand. `make tools` says what it installs.
PREFIX     ?= /usr/local
FUZZTIME   ?= 20s
SOAK       ?= 10m
PKG        ?= ./...
RACE_PKG    = $(shell go list ./pkg/... ./internal/... | grep -vE "/(bench|demo|e2e|pins|test[a-z]+|tools|workload)(/|$$)")
# These start containers and tracers and look at latencies: one package at a time, after the others.
ALONE       = /(cmd/optimizer-nri-plugin|internal/(demo|e2e(/lazy)?|tracer)|pkg/trace/tracefs)$$
TOOLS      := go run ./internal/tools/cmd/tools
SUDO       ?= $(if $(DESTDIR),,$(shell [ "$$(id -u)" = 0 ] || command -v sudo))
PLUGIN      = $(DESTDIR)/opt/nri/plugins/02-optimizer-nri-plugin
CONFIG      = $(DESTDIR)/etc/nri/conf.d/02-optimizer-nri-plugin.conf

.PHONY: build optimizer install install-optimizer install-service install-lazyd demo test test-race lint fuzz bench bench-start soak tools clean
build optimizer: ## our commands, static, into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

install install-optimizer: ## into the system, or below DESTDIR; keeps a config that is there
	@test -x bin/optimizer-nri-plugin || { echo "nothing built yet: run make optimizer first" >&2; exit 1; }
	$(SUDO) install -D -m 755 bin/optimizer-nri-plugin $(PLUGIN)
	$(SUDO) install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin bin/optimizer-server bin/optimizer
	$(SUDO) test -e $(CONFIG) || $(SUDO) install -D -m 644 configs/02-optimizer-nri-plugin.conf $(CONFIG)
	$(SUDO) mkdir -p $(DESTDIR)/opt/nri/optimizer/results

install-service: PLUGIN = $(DESTDIR)$(PREFIX)/bin/optimizer-nri-plugin
install-service: install ## the plugin started by systemd, in place of one that containerd launches
	$(SUDO) install -D -m 644 configs/optimizer-nri-plugin.service $(DESTDIR)/etc/systemd/system/optimizer-nri-plugin.service

install-lazyd: install ## the daemon of lazy mounts as a service, away from who mounts
	$(SUDO) install -D -m 644 configs/headstart-lazyd.service $(DESTDIR)/etc/systemd/system/headstart-lazyd.service

demo: ## IMAGE= and CMD= choose another workload
	go run ./internal/demo

test: ## everything, end to end too; what this machine lacks is skipped visibly
	@[ "$$(id -u)" = 0 ] || echo "make test: not root: tests that trace, mount or run containers are skipped" >&2
	-$(TOOLS) install test
	@code=0; for others in -v ""; do pkgs=$$(go list $(PKG) | grep $$others -E '$(ALONE)'); [ -z "$$pkgs" ] || \
		go test $$([ "$$others" ] || echo "-p 1") -timeout 30m $(TESTFLAGS) $$pkgs || code=1; done; exit $$code

test-race: ## under the race detector, which needs gcc
	$(TOOLS) install gcc
	@code=0; for others in -v ""; do CGO_ENABLED=1 go test $$([ "$$others" ] || echo "-p 1") -race -short -shuffle=on -timeout 20m \
		$(TESTFLAGS) $$(printf '%s\n' $(RACE_PKG) | grep $$others -E '$(ALONE)') || code=1; done; exit $$code

lint: ## golangci-lint, see .golangci.yml
	"$$($(TOOLS) path golangci-lint)" run $(PKG)
	scripts/lint-buildkit "$$($(TOOLS) path golangci-lint)"

fuzz: ## every fuzz target for FUZZTIME
	scripts/fuzz $(FUZZTIME)

bench: ## against the peers, in one run
	$(TOOLS) install bench
	go run ./internal/bench

bench-start: ## cold starts over a simulated link, against a whole pull and nydusd; draws docs/start.svg
	$(TOOLS) install bench
	go run ./internal/benchstart -svg docs/start.svg $(STARTFLAGS)

soak: ## long runs: tests called TestSoak…, for SOAK each
	SOAK=$(SOAK) go test -count=1 -timeout 0 -v -run '^TestSoak' $(PKG)

tools: ## what tests, lint and bench need, into the user's cache; Debian packages into the system
	$(TOOLS) install lint bench

clean: ## what was built; the tools stay in the user's cache
	rm -rf bin
