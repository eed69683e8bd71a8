# Every target sets up what it needs in .venv by itself (scripts/bootstrap.sh); `make PYTHON=...` names an interpreter.
SHELL := bash
BIN := .venv/bin
# Two processes, each with the files that it takes whole; their engines and kernels have a thread each.
PARALLEL := -n 2 --dist loadfile
test test-vllm test-vllm-slow: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-dynamic demo-vllm test test-vllm test-vllm-slow test-saelens test-browser coverage docs lint \
	format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: ## steer and capture a small model and write the outputs to out/demo
	@scripts/bootstrap.sh demo
	$(BIN)/steer-compile demo

demo-dynamic: ## controllers that steer by what they read from the stream; writes plots to out/dynamic
	@scripts/bootstrap.sh demo
	$(BIN)/python -m steer_compile.demo.engage
	$(BIN)/python -m steer_compile.demo.set_point

demo-vllm: ## the demo model behind vLLM's server on the CPU, steered by request; writes out/demo-vllm
	@scripts/bootstrap.sh test
	@scripts/bootstrap_vllm.sh
	.venv-vllm/bin/python -m steer_compile.demo.served

test: ## lint, types and the fast tests (CPU only)
	@scripts/bootstrap.sh test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not gpu and not slow and not vllm and not saelens and not browser" $(PARALLEL)

test-vllm: ## the tests in a real vLLM, on the CPU (an environment of its own, .venv-vllm)
	@scripts/bootstrap.sh test
	@scripts/bootstrap_vllm.sh
	.venv-vllm/bin/python -m pytest -m "vllm and not slow" $(PARALLEL) tests/vllm

test-vllm-slow: ## those of them that take minutes: pieces, pipelines, several ranks
	@scripts/bootstrap.sh test
	@scripts/bootstrap_vllm.sh
	.venv-vllm/bin/python -m pytest -m "vllm and slow" $(PARALLEL) tests/vllm

test-saelens: ## files that SAELens writes, against its own classes (an environment of its own, .venv-saelens)
	@scripts/bootstrap.sh test
	@scripts/bootstrap_saelens.sh
	.venv-saelens/bin/python -m pytest -m saelens tests/saelens

test-browser: ## the page of `steer-compile graph` in a headless Chromium (Debian: apt-get install chromium)
	@scripts/bootstrap.sh browser
	$(BIN)/python -m pytest -m browser tests/browser

coverage: ## which model architectures of transformers are steered, one line each
	@scripts/bootstrap.sh hf
	$(BIN)/steer-compile coverage

docs: ## the API reference, docs/api, from the docstrings
	@scripts/bootstrap.sh test
	$(BIN)/python scripts/api_reference.py

lint: ## ruff and mypy alone
	@scripts/bootstrap.sh test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: ## sort imports, apply safe fixes, format
	@scripts/bootstrap.sh test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove outputs, caches and build files
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis torch_compile_debug
	find steer_compile passes kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf .venv .venv-vllm .venv-saelens
