# make demo    the main job on an embedded remote      (KEEP=1 leaves it mounted, STOP=1 ends what was kept)
# make test    ruff, mypy --strict, pytest             (TESTS=tests/disk for a part, PYTEST_ARGS=-x for options, JOBS=0: one process)
# make test-containers    the image in real containers, in each start mode (minutes; root, and an engine of its own)
# make test-modes    tests/mounted in each start mode: an ordinary user, root that drops rights, a passed descriptor (half an hour; root)
# make test-servers    crash loop and fault proxy over all WebDAV servers, then POSIX and programs over each (SERVERS="nginx rclone")
# make bench   nbmountd, rclone and a local directory  (ROWS=read,small, QUICK=1, JSON=result.json)
#
# Each target does its own set-up: system packages where they are missing (root or sudo), then .venv.

.PHONY: demo test test-containers test-modes test-servers lint bench clean
.DEFAULT_GOAL := test
JOBS ?= 2

demo:
	@tools/prepare demo
	@.venv/bin/nbmountd demo $(if $(STOP),--stop) $(if $(KEEP),--keep) $(if $(DIRECTORY),--directory '$(DIRECTORY)')

lint:
	@tools/prepare test
	.venv/bin/ruff check
	.venv/bin/mypy --strict

test: lint
	.venv/bin/pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS) $(TESTS)

test-containers:
	@tools/prepare containers
	NBMOUNTD_TEST_CONTAINERS=1 .venv/bin/pytest $(PYTEST_ARGS) tests/containers

test-modes:
	@tools/prepare test
	for mode in $(or $(MODES),user drop fd); do .venv/bin/python -m tests.mounted.modes $$mode $(PYTEST_ARGS) $(or $(TESTS),tests/mounted) || exit; done

SERVERS ?= nginx lighttpd wsgidav sabre rclone nextcloud
test-servers:
	@tools/prepare test
	NBMOUNTD_TEST_SERVERS="$(SERVERS)" .venv/bin/pytest $(PYTEST_ARGS) tests/mounted/test_crash_loop.py tests/mounted/test_fault_proxy.py
	for remote in $(SERVERS); do NBMOUNTD_TEST_REMOTE=$$remote .venv/bin/pytest $(PYTEST_ARGS) tests/mounted/posix tests/mounted/programs || exit; done

bench:
	@tools/prepare bench
	@.venv/bin/python -m bench $(if $(ROWS),--rows '$(ROWS)') $(if $(QUICK),--quick) $(if $(JSON),--json '$(JSON)')

clean:
	rm -rf .venv .demo .bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
