# `make help` lists what there is. On Debian 12 only Go, git, make and CA
# certificates are expected; targets that need more install it (scripts/need).
SHELL := /bin/bash
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

FUZZTIME ?= 30s
BENCH    ?= .
COMMANDS := castrad castra-guestd castractl
VERSION  := $(shell scripts/version)

# The race detector wants a C compiler; the D-Bus tests a message bus, and busctl, which
# is systemd's; the manual's test what man formats with.
UNIT_NEEDS := gcc libc6-dev dbus-daemon systemd groff-base
E2E_NEEDS  := dbus-daemon qemu-system-x86 mmdebstrap e2fsprogs systemd-container procps strace \
  jq bash-completion zsh fish lintian rpm man-db

# Where Go has never run, what it keeps goes into the checkout: trying Castra out
# leaves nothing in a home.
ifeq ($(wildcard $(HOME)/go $(HOME)/.config/go $(HOME)/.cache/go-build),)
export GOPATH          := $(CURDIR)/.go
export XDG_CACHE_HOME  := $(CURDIR)/.go/cache
export XDG_CONFIG_HOME := $(CURDIR)/.go/config
export GOFLAGS         := $(GOFLAGS) -modcacherw# or clean could not remove it
endif

.PHONY: help
help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: build
build: ## bin/: static, version-stamped, the same bytes from any directory
	CGO_ENABLED=0 go build -trimpath -buildvcs=false \
	  -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ $(COMMANDS:%=./%)

ARCHES := amd64 arm64

.PHONY: packages
packages: ## dist/*.deb and dist/*.rpm for amd64 and arm64, the same bytes on every run
	rm -rf dist && mkdir -p dist
	for arch in $(ARCHES); do \
	  CGO_ENABLED=0 GOOS=linux GOARCH=$$arch go build -trimpath -buildvcs=false \
	    -ldflags '-s -w -X main.version=$(VERSION)' -o dist/$$arch/ $(COMMANDS:%=./%); \
	done
	go tool -modfile=packaging/go.mod nfpm --version >/dev/null # built once, not by each of those beside it
	printf '%s\n' $(foreach a,$(ARCHES),$(COMMANDS:%=%:$(a))) | xargs -P 2 -I{} sh -euc \
	  'p={}; exec scripts/package "$${p%:*}" "$${p#*:}" "dist/$${p#*:}/$${p%:*}" dist'
	rm -rf $(ARCHES:%=dist/%)

# goreleaser is built from source, which takes many minutes.
.PHONY: release-check
release-check: ## what a release would hold, into dist/, by goreleaser
	cd packaging/goreleaser && go build -o ../../.run/goreleaser github.com/goreleaser/goreleaser/v2
	.run/goreleaser check
	CASTRA_VERSION=$(VERSION) .run/goreleaser release --snapshot --clean

# Quicker: for this machine alone.
.PHONY: packages-here
packages-here:
	$(MAKE) --no-print-directory packages ARCHES="$$(go env GOARCH)"

# The packages say what belongs where. The system's services are not touched.
.PHONY: install
install: packages-here ## into DESTDIR: what the packages hold
	scripts/install '$(DESTDIR)'

.PHONY: check
check: build lint unit ## the quick loop: build, lint, unit tests with the race detector

.PHONY: lint
lint:
	scripts/need shellcheck
	scripts/lint

.PHONY: unit
unit:
	scripts/need $(UNIT_NEEDS)
	go test -race -timeout 20m ./...
	@echo 'unit: the end-to-end tests were left out; make test runs them'

.PHONY: test
test: ## every test, with real processes and a real VM; installs what it needs
	scripts/need $(UNIT_NEEDS) $(E2E_NEEDS) shellcheck
	$(MAKE) --no-print-directory -j3 -O check images packages
	$(MAKE) --no-print-directory e2e

.PHONY: e2e
e2e: build
	scripts/need $(E2E_NEEDS)
	CASTRA_E2E=1 go test -race -count=1 -timeout 30m ./e2e

.PHONY: soak
soak: packages-here build ## castrad killed 10,000 times under load, power cuts, every byte of a MiB flipped: hours
	scripts/need $(E2E_NEEDS) xfsprogs
	CASTRA_E2E=1 CASTRA_CUTS=300 go test -count=1 -timeout 4h -run '^TestPowerCut$$' -v ./e2e
	CASTRA_E2E=1 CASTRA_KILLS=10000 go test -race -count=1 -timeout 12h -run '^TestKill$$' -v ./e2e
	CASTRA_FLIP_BYTES=1048576 go test -count=1 -timeout 2h -run '^TestFlippedBitAnywhere$$' -v ./internal/eventlog

.PHONY: demo
demo: build ## a host and two guests on loopback, messages both ways
	scripts/demo

.PHONY: vm
vm: build packages-here ## boot a Debian VM with castra-guestd in it; a prompt beside it
	scripts/vm

# Apart, so that the downloads run beside the linters.
.PHONY: images
images:
	scripts/vm-base
	scripts/host-root

.PHONY: bench
bench: build ## the benchmarks, compared with docs/bench.txt; BENCH=regexp picks, COUNT=6 runs
	scripts/need dbus-daemon e2fsprogs
	scripts/bench '$(BENCH)'

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (30s)
	scripts/fuzz $(FUZZTIME)

# .vm holds a Debian tree of root's.
.PHONY: clean
clean: ## remove what was built; tools, VM image and other caches too with ALL=1
	rm -rf bin dist .run $(if $(ALL),.go .tools)
	$(if $(ALL),rm -rf .vm 2>/dev/null || sudo rm -rf .vm)
